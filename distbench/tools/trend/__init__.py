"""Results of many nights: which cases changed their verdict and since when, and times against their noise."""
