"""ATOM's modular kernel for MoRI, with its own cut or that of its plugin for vLLM, as a caller."""
