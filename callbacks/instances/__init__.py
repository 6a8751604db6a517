"""Instance selection in a fit."""
