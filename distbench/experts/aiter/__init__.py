"""Experts by `aiter.fused_moe`: its package, the layout of its weights and arguments, and its log lines."""
