"""What a case is: its keys, where their values come from, and suites of cases."""
