"""Whole runs: exact resume, costs and budgets."""
