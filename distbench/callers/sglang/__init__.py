"""SGLang's MoRI dispatcher, its cut and its aiter runner as a caller."""
