"""What the supervisors of several nodes tell each other (docs/cluster.md)."""
