"""Each node alone, pairs of nodes, all together: which node or link is at fault (docs/cluster-plan.md)."""
