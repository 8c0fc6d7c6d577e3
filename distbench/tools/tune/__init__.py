"""Tuning of the Triton experts: candidates, trials, tables."""
