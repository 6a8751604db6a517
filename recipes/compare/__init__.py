"""``curation compare``: every method over the same seeds, at one budget, in one report."""
