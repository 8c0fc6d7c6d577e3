"""What prepares tensors for kernels."""
