"""Rows that one rank records during its passes, for a bundle (report/bundle/); nothing is kept unless requested."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload


class Seen(NamedTuple):
    """One pass on one rank, on the CPU.

    sources int64 [total_recv, 2] in slot order; the rows that reached the experts, [0, live): `received`, and the
    experts' output, bf16 [live, H].
    """

    sources: Tensor
    received: TokenBatch
    expert_rows: Tensor


class Finished(NamedTuple):
    """Inputs of the passes and their outputs: tokens [n, H] of each arm, and of the oracle if there is one."""

    workload: Workload
    batch: TokenBatch
    weights: ExpertWeights
    outputs: dict[str, Tensor]


class Recorder:
    """Records one rank's view of a case, separately for each kind of inputs."""

    def __init__(self) -> None:
        self.parts: dict[str, PartRecorder] = {}

    def part(self, inputs: str) -> PartRecorder:
        """The recorder of the passes with one kind of inputs."""
        return self.parts.setdefault(inputs, PartRecorder())


class PartRecorder:
    """Keeps, for each arm, the pass whose outputs are kept (see `Passes`): its live rows, copied to the CPU."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.finished: Finished | None = None
        self._fresh: dict[str, Seen] = {}

    def take(self, arm: str, sources: Tensor, given: ExpertInput, expert_out: Tensor, *, joins: bool = False) -> None:
        """Copy the rows of a pass before combine releases the buffers; one that `joins` is its second sub-batch."""
        live = min(int(given.num_local_tokens), given.rows, expert_out.shape[0])
        received = TokenBatch(
            hidden=_copied(given.hidden[:live]),
            scales=None if given.scales is None else _copied(given.scales[:live]),
            weights=_copied(given.weights[:live]),
            ids=_copied(given.ids[:live]),
        )
        seen = Seen(_copied(sources), received, _copied(expert_out[:live]))
        self._fresh[arm] = _joined(self._fresh[arm], seen) if joins else seen

    def keep(self) -> None:
        """Keep the passes taken since the last repeat, replacing earlier ones of the same arms."""
        self.seen |= self._fresh

    def finish(self, finished: Finished) -> None:
        """Record the end of all passes."""
        self.finished = finished


def _joined(first: Seen, second: Seen) -> Seen:
    """Both sub-batches as one pass: rows that reached the experts in front, as their sources."""
    lives = len(first.expert_rows), len(second.expert_rows)
    sources = [one.sources[:live] for one, live in zip((first, second), lives, strict=True)]
    sources += [one.sources[live:] for one, live in zip((first, second), lives, strict=True)]
    fields = [
        None if mine is None or other is None else torch.cat([mine, other])
        for mine, other in zip(first.received, second.received, strict=True)
    ]
    hidden, scales, weights, ids = fields
    assert hidden is not None  # noqa: S101 - only scales may be missing
    assert weights is not None  # noqa: S101 - as above
    assert ids is not None  # noqa: S101 - as above
    rows = torch.cat([first.expert_rows, second.expert_rows])
    return Seen(torch.cat(sources), TokenBatch(hidden, scales, weights, ids), rows)


def _copied(rows: Tensor) -> Tensor:
    return rows.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
