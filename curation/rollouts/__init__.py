"""Rollouts for learning from verifiable rewards: how many, how made, and what each is worth."""
