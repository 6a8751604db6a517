"""Callbacks for modules that learn from rollouts."""
