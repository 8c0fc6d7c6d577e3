"""Fault location in a cluster by runs on each node alone, on pairs, and on all together (docs/cluster-plan.md)."""
