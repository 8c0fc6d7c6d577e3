"""What a case leaves behind: report.json and what a person reads."""
