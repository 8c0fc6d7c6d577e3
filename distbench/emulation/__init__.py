"""Stand-ins with the names and the observed behaviour of packages that need hardware. Their outputs say `emulated`."""
