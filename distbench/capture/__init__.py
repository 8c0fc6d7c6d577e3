"""Routing recorded from a running SGLang or vLLM, without a device synchronisation in the way of a step (capture.md).

Loads no torch: `sglang` and `vllm` in this package are called in every process of a server.
"""
