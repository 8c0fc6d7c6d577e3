"""A validation in the formats that a cluster's tools read, a module a format, as `export` has them for results."""
