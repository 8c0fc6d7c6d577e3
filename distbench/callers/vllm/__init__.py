"""vLLM's MoRI prepare and finalize and its aiter experts as a caller."""
