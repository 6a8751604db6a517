"""Load balancing of mixtures of experts."""
