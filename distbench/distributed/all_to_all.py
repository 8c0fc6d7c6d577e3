"""Rows between ranks: by one all-to-all, or only between ranks that have rows for each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from distbench.distributed.exchange import Underway, wait_for
from distbench.distributed.waits import collective

_FEW = 0.5


class AllToAll:
    """`Exchange` by the group's own all-to-all.

    Called as `torch.distributed.all_to_all_single` calls it, whose checks of each call take longer than the call.
    """

    name = "all_to_all"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._at_once, self._later = dist.AllToAllOptions(), dist.AllToAllOptions()
        self._at_once.asyncOp, self._later.asyncOp = False, True

    def start(
        self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Sequence[Underway]:
        """See `Exchange.start`."""
        with collective("all_to_all", outgoing.get_device()):
            return (self._group.alltoall_base(incoming, outgoing, list(received), list(sent), self._later),)

    def run(self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """See `Exchange.run`: saves two events on a device."""
        with collective("all_to_all", outgoing.get_device()):
            self._group.alltoall_base(incoming, outgoing, list(received), list(sent), self._at_once).wait()


class SendReceive:
    """`Exchange` without empty messages, where gloo's all-to-all has W (W - 1) of them."""

    name = "send_recv"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def start(
        self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Sequence[Underway]:
        """See `Exchange.start`."""
        group = self._group
        with collective("send and receive", outgoing.get_device()):
            receipts = [dist.irecv(rows, group=group, group_src=peer) for peer, rows in _parts(incoming, received)]
            sendings = [dist.isend(rows, group=group, group_dst=peer) for peer, rows in _parts(outgoing, sent)]
        return tuple(work for work in (*receipts, *sendings) if work is not None)

    def run(self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """See `Exchange.run`."""
        wait_for(self.start(incoming, outgoing, received, sent))


def few_pairs(counts: Tensor) -> bool:
    """Whether less than half of all pairs of ranks exchange rows; counts int64 [W, W]: from i to j."""
    ranks = len(counts)
    busy = int((counts > 0).sum()) - int((counts.diagonal() > 0).sum())
    return busy < _FEW * ranks * (ranks - 1)


def _parts(rows: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for peer, count in enumerate(counts):
        if count:
            yield peer, rows[start : start + count]
        start += count
