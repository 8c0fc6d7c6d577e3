"""Communication between the supervisors of several nodes (docs/cluster.md)."""
