"""Gaps of a node for each way of running a case: facts (probe.py), and their meaning (checks.py, vendors.py)."""
