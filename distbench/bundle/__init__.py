"""Reproduction bundles: what a failing case leaves for another machine (docs/reproduce.md)."""
