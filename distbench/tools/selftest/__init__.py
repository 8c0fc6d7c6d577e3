"""Self-test: injected faults and clean cases, their outcomes, and the table."""
