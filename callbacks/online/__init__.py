"""Online batch selection."""
