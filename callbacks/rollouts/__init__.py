"""Adaptive rollouts."""
