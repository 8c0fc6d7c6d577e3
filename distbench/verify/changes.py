"""Memory that a pass may read and must not write: digests of its rows, in which a changed word shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.case.stages import Arm, Stage
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.transport.base import Dispatched
from distbench.verify.records import Divergence, Evidence
from distbench.verify.row_compare import word_digests

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
OVERWRITTEN = "overwritten by the experts"


def words_of(rows: Tensor) -> Tensor:
    """Return rows [n, c] as the widest words that divide a row, [n, w]; a copy only where they are not in order."""
    size = rows.shape[1] * rows.element_size()
    word = next(word for word in _WORDS if size % word.itemsize == 0)
    if not rows.is_contiguous() or rows.storage_offset() * rows.element_size() % word.itemsize:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(word)


class Touched(NamedTuple):
    """Rows [m] whose content changed between dispatch's return and the experts' start, and while the experts ran."""

    by_cut: Tensor
    by_experts: Tensor


class Looks:
    """What a pass's received rows held when dispatch returned, and when the experts began.

    Rows are checked after the experts, so that no rank waits for its device in between. Then these digests say since
    when a wrong row has been wrong. A look that was not taken blames nobody.
    """

    def __init__(self, rows: int) -> None:
        """`rows` are those that the rank receives."""
        self._rows = rows
        self.begin()

    def begin(self) -> None:
        """Forget the looks of an earlier pass."""
        self._arrived: list[Tensor] = []
        self._given: list[Tensor] = []
        self._total: Tensor | None = None
        self._live: Tensor | None = None

    def arrived(self, dispatched: Dispatched) -> None:
        """Look at what dispatch returned."""
        self._arrived, self._total = self._seen(dispatched.fields()), dispatched.total_recv.clone()

    def given(self, given: ExpertInput) -> None:
        """Look at what the experts are given."""
        self._given, self._live = self._seen(given.fields()), given.num_local_tokens.clone()

    def counts(self, dispatched: Dispatched, given: ExpertInput) -> tuple[Tensor, Tensor]:
        """Return total_recv and num_local_tokens as they were seen first."""
        total, live = self._total, self._live
        return dispatched.total_recv if total is None else total, given.num_local_tokens if live is None else live

    def touched(self, given: ExpertInput, order: Tensor) -> Touched:
        """Return the changed rows, in the canonical order of the slots `order` [m]."""
        now = self._seen(given.fields()) if self._given else []
        return Touched(
            *(self._ordered(_differing(*pair), order) for pair in ((self._arrived, self._given), (self._given, now)))
        )

    def late(self, right: Sequence[Tensor], order: Tensor) -> Tensor:
        """Return the rows [m] that did not hold the content of `right`, fields [m, .], when dispatch returned.

        Rows past the end of a buffer that is too small were never seen.
        """
        late = torch.zeros_like(order, dtype=torch.bool)
        if len(order) == self._rows and self._arrived:
            seen = order < min(map(len, self._arrived))
            pairs = zip(self._arrived, right, strict=True)
            late[seen] = torch.stack([digests[order[seen]] != _digests(rows[seen]) for digests, rows in pairs]).any(0)
        return late

    def _seen(self, fields: Sequence[Tensor]) -> list[Tensor]:
        return [_digests(part[: self._rows]) for part in fields]

    def _ordered(self, changed: Tensor | None, order: Tensor) -> Tensor:
        if changed is None or len(order) != self._rows:
            return torch.zeros_like(order, dtype=torch.bool)
        whole = changed.new_zeros(self._rows)
        whole[: len(changed)] = changed
        return whole[order]


def _digests(rows: Tensor) -> Tensor:
    return word_digests(words_of(rows))


def _differing(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor | None:
    """Return a mask of the rows that both have and that differ; None where one of the looks is missing."""
    if not before or len(before) != len(after):
        return None
    rows = min(map(len, (*before, *after)))
    return torch.stack([one[:rows] != two[:rows] for one, two in zip(before, after, strict=True)]).any(0)


class WeightsWatch:
    """Notices that the experts changed the weights of their rank, from which the errors of an arm are measured too."""

    def __init__(self, weights: ExpertWeights, rank: int) -> None:
        """Keep sums of the weights as they are given to the experts."""
        self._weights, self._rank = weights, rank
        self._given = self._held()

    def changed(self) -> Divergence | None:
        """Return a divergence of the first tensor that differs from what was given, of the padded arm: any may have."""
        for name, now in self._held().items():
            changed = int((now != self._given[name]).sum())
            if changed:
                return Divergence(
                    stage=Stage.EXPERTS,
                    arm=Arm.PADDED,
                    rank=self._rank,
                    field=name,
                    against="what the experts were given, after all arms,",
                    rows=changed,
                    evidence=Evidence(pattern=f"{name} {OVERWRITTEN}", fields=[name]),
                )
        return None

    def _held(self) -> dict[str, Tensor]:
        """Return the sums of each expert's words, by tensor, and each word of the mask: one read, without a copy.

        No change of a single word is lost; changes of an expert that cancel each other out are.
        """
        held = self._weights._asdict()
        return {
            name: words_of(part.flatten(1) if part.dim() > 1 else part.unsqueeze(1)).sum(1, dtype=torch.int64)
            for name, part in held.items()
            if part is not None
        }
