"""What samplers need from a fit."""
