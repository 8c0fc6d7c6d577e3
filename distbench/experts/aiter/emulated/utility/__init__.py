"""Dtypes by aiter's names."""
