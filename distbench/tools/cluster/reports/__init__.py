"""Export formats of a validation, one module per format, as in `export` for results."""
