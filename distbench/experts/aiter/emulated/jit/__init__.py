"""Modules that give aiter's tables, its compiled modules and its device."""
