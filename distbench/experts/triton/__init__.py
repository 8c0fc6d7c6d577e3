"""Experts in Triton kernels, with the interface and the kind of kernel choice of aiter (docs/triton.md)."""
