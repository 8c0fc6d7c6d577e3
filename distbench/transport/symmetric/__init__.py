"""Dispatch and combine over memory that the ranks of a host map from each other (docs/symmetric.md)."""
