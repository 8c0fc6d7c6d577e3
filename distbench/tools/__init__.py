"""Work over many cases: bisect, shrink, replay, compare, self-test, mutants, cluster validation."""
