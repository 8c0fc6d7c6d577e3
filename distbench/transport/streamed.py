"""A transport on the communication stream of two-batch overlap, ordered by events as SGLang orders its own.

Source: `_dispatch_core` and `_combine_core` of `_MoriEPDispatcherImplNormal` (`token_dispatcher/moriep.py`, SGLang
0.5.23): the communication stream waits for an event of the compute stream, the compute stream for one recorded after
the call, and no tensor is recorded on either stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from distbench.transport.base import Dispatched, Transport, TransportAround
from distbench.workload.batch import TokenBatch

T = TypeVar("T")


class StreamedTransport(TransportAround):
    """Runs another transport on `stream`, which the transports of both sub-batches share.

    What a send half reads is ready at an event that is recorded when it is called. Where the send half only takes its
    arguments (`inner.sends_early` is false), the stream waits for that event in the receive half, so that the calls of
    the other sub-batch in between do not wait for it.
    """

    def __init__(self, inner: Transport, stream: torch.cuda.Stream) -> None:
        super().__init__(inner)
        self.facts["stream"] = "communication"
        self._stream = stream
        self._ready: torch.cuda.Event | None = None

    def dispatch_send(self, batch: TokenBatch) -> None:
        """See `Transport.dispatch_send`."""
        self._send(lambda: self._inner.dispatch_send(batch))

    def dispatch_recv(self) -> Dispatched:
        """See `Transport.dispatch_recv`; the compute stream waits, not the host."""
        return self._receive(self._inner.dispatch_recv)

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """See `Transport.combine_send`."""
        self._send(lambda: self._inner.combine_send(expert_out, ids))

    def combine_recv(self) -> Tensor:
        """See `Transport.combine_recv`; the compute stream waits, not the host."""
        return self._receive(self._inner.combine_recv)

    def _send(self, call: Callable[[], None]) -> None:
        if not self.sends_early:
            call()
        ready = torch.cuda.Event()
        ready.record()
        if not self.sends_early:
            self._ready = ready
            return
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            call()

    def _receive(self, call: Callable[[], T]) -> T:
        if self._ready is not None:
            self._stream.wait_event(self._ready)
            self._ready = None
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            result = call()
            done.record(self._stream)
        torch.cuda.current_stream().wait_event(done)
        return result
