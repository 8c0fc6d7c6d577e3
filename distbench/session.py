"""One rank's place among the ranks that torchrun started: process groups, device, and what all must agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.breadcrumbs import Breadcrumbs
from distbench.errors import InvalidCase

_WORD_BYTES = 8


class Session:
    """Open from start to end of a launch; cases come and go."""

    def __init__(self, crumbs: Breadcrumbs, timeout_s: float, environ: Mapping[str, str] = os.environ) -> None:
        """Join the process group that torchrun's variables describe; no collective may take `timeout_s`. Collective."""
        self.crumbs = crumbs
        self.rank = int(environ["RANK"])
        self.world_size = int(environ["WORLD_SIZE"])
        self.device = torch.device("cpu")
        _share_cores(int(environ.get("LOCAL_WORLD_SIZE", "1")))
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        self.group = _world_group()
        self._groups = {self.world_size: self.group}
        self._closing = contextlib.ExitStack()

    def enter(self, ep_size: int) -> bool:
        """Make the first `ep_size` ranks the group of the next case; whether this rank is in it. Collective."""
        if ep_size not in self._groups:
            self._groups[ep_size] = dist.new_group(list(range(ep_size)))
        self.group = self._groups[ep_size]
        return self.rank < ep_size

    def agree(self, case_digest: str, probe: Tensor, counts: Tensor) -> Tensor:
        """Prove that all ranks hold one case and one workload, and return everyone's row counts. Collective.

        `case_digest` is the case's hash, `probe` int64 [p] a digest of generated inputs that every rank must share,
        `counts` int64 [W] the rows that this rank sends to each. Returns int64 [W, W] on the CPU.

        Raises:
            InvalidCase: on every rank, naming the ranks that hold something else than rank 0.

        """
        raw = bytearray.fromhex(case_digest)
        words = torch.frombuffer(raw, dtype=torch.int64)
        table = self._everyones(torch.cat([words, probe.cpu(), counts.cpu()]), counts.numel())
        shared = len(raw) // _WORD_BYTES
        _refuse_strangers(table[:, :shared], "case's hash", "start all ranks with the same case and environment")
        _refuse_strangers(
            table[:, shared : shared + probe.numel()], "generated inputs", "use one torch version on all ranks"
        )
        return table[:, shared + probe.numel() :].clone()

    def on_any_rank(self, *, value: bool) -> bool:
        """Whether `value` is true on any rank of the case's group. Collective."""
        held = torch.tensor([int(value)], device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self.group)
        return bool(held)

    def announce(self, value: int) -> int:
        """Return rank 0's value on every rank. Collective, over all ranks of the launch."""
        return self.share([value])[0]

    def share(self, values: Sequence[int]) -> list[int]:
        """Return rank 0's values, as many on every rank, everywhere. Collective, over all ranks of the launch."""
        shared = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.broadcast(shared, group=self._groups[self.world_size], group_src=0)
        numbers: list[int] = shared.tolist()
        return numbers

    def at_close(self, leave: Callable[[], None]) -> None:
        """Have `leave` called before the process groups are left, the last one given first."""
        self._closing.callback(leave)

    def close(self) -> None:
        """Leave the process groups."""
        self._closing.close()
        dist.destroy_process_group()

    def _everyones(self, mine: Tensor, ep_size: int) -> Tensor:
        """Return every rank's row. Gathering and broadcasting takes gloo a fifth of the time of its all-gather."""
        table = mine.new_empty(ep_size, mine.numel())
        dist.gather(mine, list(table) if self.rank == 0 else None, group=self.group, group_dst=0)
        dist.broadcast(table, group=self.group, group_src=0)
        return table


def _share_cores(local_ranks: int) -> None:
    """Give each rank its share of the threads; where ranks outnumber cores, let each finish its turn.

    A message that wakes one rank would otherwise interrupt another in the middle of its work, which costs tiny cases
    about a seventh of their time.
    """
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(cores // local_ranks, 1))
    if local_ranks > cores and hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        message = "torch.distributed has no world group right after it was made"
        raise RuntimeError(message)
    return group


def _refuse_strangers(table: Tensor, what: str, fix: str) -> None:
    strangers = (table != table[0]).any(1).nonzero().flatten().tolist()
    if strangers:
        ranks = ", ".join(str(rank) for rank in strangers[:16])
        message = f"ranks disagree on the {what}: rank {ranks} not as rank 0; {fix}"
        raise InvalidCase(message)
