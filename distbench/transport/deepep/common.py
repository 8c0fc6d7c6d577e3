"""What DeepEP's normal and low-latency kernels have in common as transports."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distbench.transport.base import TransportContext, WholeTransport, poison_
from distbench.transport.deepep.package import Package
from distbench.transport.deepep.receive import ReceiveBuffer


class DeepEpTransport(WholeTransport):
    """A receive buffer beside `buffer`, DeepEP's own, and the tensors that DeepEP returned last."""

    local_slots = True

    def __init__(self, context: TransportContext, package: Package, buffer: Any) -> None:
        self.capacity = context.case.capacity
        self._case, self._rank = context.case, context.rank
        self._package, self._buffer = package, buffer
        self._received = ReceiveBuffer(context.like, self.capacity, context.rank)
        self._last: list[Tensor] = []

    def forget(self) -> None:
        """See `Transport.forget`: what DeepEP returned last is poisoned; its own memory is out of reach."""
        for tensor in self._last:
            poison_(tensor)
        self._received.poison()
        self._last = []

    def close(self) -> None:
        """See `Transport.close`."""
        self._buffer.destroy()

    def about(self) -> dict[str, Any]:
        """See `Transport.about`."""
        return {"deep_ep": {"version": self._package.version}}
