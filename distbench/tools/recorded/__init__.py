"""Recorded routing from what others write, as a trace of distbench."""
