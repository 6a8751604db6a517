"""Records of every sample."""
