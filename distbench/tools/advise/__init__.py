"""Advice on a limit: proven, seen and by chance, from counts of rows, without a GPU and without tokens."""
