"""Faults that a case can ask for, one module a stage; nothing of it is imported where none is asked for."""
