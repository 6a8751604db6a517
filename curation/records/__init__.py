"""What is remembered of every sample."""
