"""Dispatch and combine by DeepEP, the package deep_ep: its normal and its low-latency kernels (docs/deepep.md)."""
