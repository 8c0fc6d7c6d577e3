"""Preparation of tensors for kernels."""
