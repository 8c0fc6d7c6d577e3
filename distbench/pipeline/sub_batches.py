"""Two-batch overlap: the sub-batches of a rank's tokens, each with a transport of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.experts.base import Cut, Experts
from distbench.transport.base import Transport
from distbench.transport.streamed import StreamedTransport
from distbench.workload.batch import TokenBatch


def unchanged(cut: Cut) -> Cut:
    """Return the cut itself."""
    return cut


class SubBatch(NamedTuple):
    """One sub-batch: a rank's tokens of it, its transport, and the experts.

    `place` is that among `SUB_BATCHES`. `starts` int64 [W]: its first token on each rank. Faults are around
    transport and experts, and those of the cut in `around`.
    """

    place: int
    batch: TokenBatch
    starts: Tensor
    transport: Transport
    experts: Experts
    around: Callable[[Cut], Cut] = unchanged

    def sources(self) -> Tensor:
        """Return (source rank, source token) as `Transport.sources`, with the token's number in the whole batch."""
        found = self.transport.sources()
        known = found[:, 0].clamp(0, len(self.starts) - 1)
        return torch.stack([found[:, 0], found[:, 1] + self.starts[known]], dim=1)


def split_batch(case: Case, batch: TokenBatch, rank: int) -> tuple[TokenBatch, ...]:
    """Split a rank's tokens; see `Case.sub_batch_tokens`. Views of the whole batch, in its order."""
    first, second = (tokens[rank] for tokens in case.sub_batch_tokens)
    sides = zip(*(((None, None) if part is None else part.split([first, second])) for part in batch), strict=True)
    return tuple(TokenBatch(*side) for side in sides)


def first_tokens(case: Case, device: torch.device) -> list[Tensor]:
    """Return the first token of each sub-batch on each rank, int64 [W]."""
    first = torch.tensor(case.sub_batch_tokens[0], device=device)
    return [torch.zeros_like(first), first]


def on_streams(case: Case, transports: list[Transport], device: torch.device) -> list[Transport]:
    """Return the transports on one communication stream, as SGLang's normal mode has it; the CPU has none.

    AsyncLL, the kernel of its low-latency mode, runs on the compute stream: its halves are kernels of their own.
    """
    halves = case.transport == "mori" and all(one.sends_early for one in transports)
    if device.type == "cpu" or halves:
        return transports
    stream = torch.cuda.Stream(device)
    return [StreamedTransport(one, stream) for one in transports]
