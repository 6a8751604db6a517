"""Which indices form a batch, before anything is loaded."""
