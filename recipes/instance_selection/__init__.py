"""Selecting the samples of a recipe's training set before the first step: what ``curation select`` calls."""
