"""Runs the corpus of mutants (distbench.faults.mutants) and says which of them the bench sees."""
