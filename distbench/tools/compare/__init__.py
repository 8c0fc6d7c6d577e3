"""Comparison of two sets of results: verdicts first, then times against the noise of both (docs/compare.md)."""
