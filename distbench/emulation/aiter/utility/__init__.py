"""Types by aiter's names."""
