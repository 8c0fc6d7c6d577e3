"""Reproduction bundles of failing cases, for another machine (docs/reproduce.md)."""
