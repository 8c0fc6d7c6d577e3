"""Choice of a kernel from the rows of the input, as aiter chooses."""
