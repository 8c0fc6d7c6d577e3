"""What a node lacks for each way of running a case: facts (probe.py), what they mean (checks.py, vendors.py)."""
