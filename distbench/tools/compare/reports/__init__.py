"""Export formats of a comparison, one module per format, as in `export` for results."""
