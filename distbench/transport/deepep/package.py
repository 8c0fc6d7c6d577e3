"""The package deep_ep, and its buffer between the ranks of a group."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from distbench.errors import Unsupported
from distbench.utils.text import one_line
from distbench.utils.variables import whole

_DEPTH, _DEFAULT_DEPTH = "NVSHMEM_QP_DEPTH", 1024
_DEPTH_UNIT = 2
"""Entries of a queue for each token that a rank may send, and for one more: `low_latency_dispatch` asserts them."""
_LOW_LATENCY_COLUMNS = 512


class Package:
    """The names of deep_ep that a transport uses."""

    def __init__(self) -> None:
        """Import it.

        Raises:
            Unsupported: it is missing, or refuses this machine, as it does without a device.
        """
        try:
            import deep_ep

            self.buffer, self.ids_dtype = deep_ep.Buffer, deep_ep.topk_idx_t
        except (ImportError, AttributeError, AssertionError, OSError, RuntimeError) as error:
            message = (
                f"transport deepep: {one_line(error) or type(error).__name__}; install sgl-deep-ep, or another build "
                "of deep_ep for this torch (docs/deepep.md)"
            )
            raise Unsupported(message) from error
        self.version = str(getattr(deep_ep, "__version__", ""))

    def normal(self, group: dist.ProcessGroup, ranks: int, row_bytes: int) -> Any:
        """Return a buffer for normal kernels, and rows of at most `row_bytes`. Collective.

        Raises:
            Unsupported: DeepEP has no configuration for this number of ranks, or needs RDMA between them.
        """
        try:
            configs = [self.buffer.get_dispatch_config(ranks), self.buffer.get_combine_config(ranks)]
        except AssertionError as error:
            message = f"transport deepep: {one_line(error)}; its normal kernels are for 2, 4 or 8 ranks of one host"
            raise Unsupported(message) from error
        size = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
        if any(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs):
            message = f"transport deepep: {ranks} ranks need RDMA, whose receive has no sources; use up to 8"
            raise Unsupported(message)
        return self.buffer(group, size, 0, explicitly_destroy=True)

    def low_latency(self, group: dist.ProcessGroup, ranks: int, tokens: int, hidden: int, experts: int) -> Any:
        """Return a buffer for low-latency kernels, for at most `tokens` of each rank. Collective.

        Raises:
            InvalidCase: NVSHMEM_QP_DEPTH is no whole number, or too small for a single token.
            Unsupported: its queues are too short for `tokens`, or its kernels too coarse for the columns.
        """
        depth = whole(_DEPTH, os.environ.get(_DEPTH, str(_DEFAULT_DEPTH)), least=2 * _DEPTH_UNIT)
        if depth < _DEPTH_UNIT * (tokens + 1):
            message = (
                f"transport deepep: max_dispatch_tokens_per_rank = {tokens}: low-latency kernels need {_DEPTH} of "
                f"{_DEPTH_UNIT * (tokens + 1)}, it is {depth}; lower the one to {depth // _DEPTH_UNIT - 1}, or raise "
                "the other"
            )
            raise Unsupported(message)
        if hidden % _LOW_LATENCY_COLUMNS:
            message = f"transport deepep: hidden_size = {hidden}: low-latency kernels take multiples of 512 columns"
            raise Unsupported(message)
        size = self.buffer.get_low_latency_rdma_size_hint(tokens, hidden, ranks, experts)
        return self.buffer(
            group, 0, size, low_latency_mode=True, num_qps_per_rank=experts // ranks, explicitly_destroy=True
        )
