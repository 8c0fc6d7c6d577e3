"""Runs the corpus of mutants (distbench.faults.mutants) and reports which of them the bench detects."""
