"""A case on one rank: dispatch, truncation, experts and combine in each arm, with checks and timing."""
