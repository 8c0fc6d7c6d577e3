"""Two sets of results side by side: verdicts first, then times against the noise that both have (docs/compare.md)."""
