"""Where aiter finds its tables, its compiled modules and its device."""
