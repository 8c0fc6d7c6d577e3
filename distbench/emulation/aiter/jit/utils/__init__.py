"""What device this is."""
