"""Largest distance between two equally good results, as a share of the token's largest magnitude. Loads no torch."""

# Top-k bf16 adds and up to top-k rounded rank rows, 2**-9 each.
TOLERANCE = 2.0**-5

# The same where weights and intermediate are e4m3: half a step of each, over a token's few routes.
FP8_TOLERANCE = 2.0**-3
