"""Comparison, diagnosis and verdict."""
