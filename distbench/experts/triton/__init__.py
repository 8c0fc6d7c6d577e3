"""Experts in Triton kernels: the same interface and the same kind of kernel choice as aiter (docs/triton.md)."""
