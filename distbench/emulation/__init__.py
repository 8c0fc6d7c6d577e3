"""Stand-ins with the names and the habits of packages that need hardware. Every output made with one says so."""
