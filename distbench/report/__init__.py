"""Output of a case: report.json, and text for a person."""
