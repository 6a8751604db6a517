"""Torchmetrics of what was trained on."""
