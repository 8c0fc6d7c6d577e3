"""The commands, one module each: `add` describes it to the parser, and what it does is loaded when it is used."""
