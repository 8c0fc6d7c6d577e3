"""The commands, one module each: `add` adds it to the parser, and its implementation is loaded on use."""
