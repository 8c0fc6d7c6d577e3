"""Would the bench have noticed? Faults and clean cases, what came of them, and the table."""
