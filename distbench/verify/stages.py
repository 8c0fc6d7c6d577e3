"""What one rank checks in every pass: received rows against their sources, expert rows and tokens against the oracle.

The final bits alone would miss damage that a later rounding hides, so each stage is held against what it should be.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.truncation import ExpertInput
from distbench.verify.bitwise import bits_at, differing
from distbench.verify.records import Divergence
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload
from distbench.workload.routing import destinations


class _Received(NamedTuple):
    """Received rows in order of (source rank, source token): keys [m], what they must hold, and expert rows."""

    keys: Tensor
    batch: TokenBatch
    expert_rows: Tensor | None


class StageChecker:
    """Checks the passes of one case on one rank; the first pass seen is the baseline of the others."""

    def __init__(self, workload: Workload, rank: int, counts: Tensor) -> None:
        """`counts` int64 [W, W]: rows that rank i sends to rank j, as agreed."""
        self._workload = workload
        self._rank = rank
        self._counts = counts
        self._known: _Received | None = None
        self._baseline_rows: Tensor | None = None

    def check_rows(self, arm: str, sources: Tensor, given: ExpertInput, expert_out: Tensor) -> Divergence | None:
        """Return where this pass's received rows or expert rows first go wrong.

        Rows that a cut took away are not looked at here; see `check_cut`.
        """
        broken = self._check_sources(arm, sources)
        if broken is not None:
            return broken
        known, order = self._canonical(sources)
        live = min(int(given.num_local_tokens), given.rows)
        place = _Place(arm, self._rank, sources, order, order < live)
        received = TokenBatch(given.hidden, given.scales, given.weights, given.ids)
        for field, actual, expected in zip(TokenBatch._fields, received, known.batch, strict=True):
            if actual is not None and expected is not None:
                wrong = place.first_difference("dispatch", field, "source", actual, expected)
                if wrong is not None:
                    return wrong
        return self._check_membership(place, known) or self._check_expert_rows(place, known, expert_out)

    def check_cut(self, arm: str, sources: Tensor, given: ExpertInput) -> Divergence | None:
        """Return the first received row that this pass did not give to the experts."""
        live = min(int(given.num_local_tokens), given.rows)
        if sources.shape[0] <= live:
            return None
        source_rank, source_token = sources[live].tolist()
        return Divergence(
            stage="truncate",
            arm=arm,
            rank=self._rank,
            source_rank=source_rank,
            source_token=source_token,
            row=live,
            field="rows",
            against="received",
            rows=sources.shape[0] - live,
        )

    def check_tokens(self, arm: str, combined: Tensor, expected: Tensor | None) -> Divergence | None:
        """Return where this pass's tokens first differ from the oracle; None too where there is no exact oracle."""
        if expected is None:
            return None
        wrong = differing(combined, expected)
        return _first("combine", arm, self._rank, "tokens", "oracle", combined, expected, wrong)

    def _check_sources(self, arm: str, sources: Tensor) -> Divergence | None:
        by_rank = torch.bincount(sources[:, 0].clamp(min=0), minlength=len(self._counts))[: len(self._counts)].cpu()
        agreed = self._counts[:, self._rank]
        unique = torch.unique(sources, dim=0).shape[0] if sources.numel() else 0
        tokens = torch.tensor(self._workload.tokens_per_rank, device=sources.device)
        below = sources[:, 1] < tokens[sources[:, 0].clamp(0, len(tokens) - 1)]
        inside = bool((sources >= 0).all() and below.all())
        if inside and unique == sources.shape[0] and torch.equal(by_rank, agreed):
            return None
        return Divergence(
            stage="dispatch",
            arm=arm,
            rank=self._rank,
            field="sources",
            against=f"{agreed.tolist()} rows from each rank, each token once",
            rows=int(agreed.sum()) - unique if inside else int(sources.shape[0]),
        )

    def _canonical(self, sources: Tensor) -> tuple[_Received, Tensor]:
        keys = (sources[:, 0] << 32) | sources[:, 1]
        keys, order = keys.sort()
        if self._known is None or not torch.equal(self._known.keys, keys):
            batch = self._workload.token_rows(keys >> 32, keys & 0xFFFF_FFFF)
            self._known = _Received(keys, batch, self._workload.expected_rows(self._rank, batch))
        return self._known, order

    def _check_membership(self, place: _Place, known: _Received) -> Divergence | None:
        belongs = destinations(known.batch.ids, self._workload.experts_per_rank, len(self._counts))[:, self._rank]
        if bool(belongs.all()):
            return None
        stray = place.sources[place.order[~belongs]][0].tolist()
        return place.divergence("dispatch", "sources", "the routing", stray, int((~belongs).sum()))

    def _check_expert_rows(self, place: _Place, known: _Received, expert_out: Tensor) -> Divergence | None:
        expected, against = known.expert_rows, "oracle"
        if expected is None:
            if self._baseline_rows is None:
                self._baseline_rows = expert_out[place.order]
                return None
            expected, against = self._baseline_rows, "padded"
        return place.first_difference("experts", "rows", against, expert_out, expected)


class _Place(NamedTuple):
    """Where rows stand: `order` [m] slots in canonical order, `visible` [m] those that the cut left."""

    arm: str
    rank: int
    sources: Tensor
    order: Tensor
    visible: Tensor

    def first_difference(
        self, stage: str, field: str, against: str, actual: Tensor, expected: Tensor
    ) -> Divergence | None:
        slots, expected = self.order[self.visible], expected[self.visible]
        actual = actual[slots]
        found = _first(stage, self.arm, self.rank, field, against, actual, expected, differing(actual, expected))
        if found is None or found.row is None:
            return found
        slot = int(slots[found.row])
        source_rank, source_token = self.sources[slot].tolist()
        return msgspec.structs.replace(found, row=slot, source_rank=source_rank, source_token=source_token)

    def divergence(self, stage: str, field: str, against: str, source: list[int], rows: int) -> Divergence:
        return Divergence(
            stage=stage,
            arm=self.arm,
            rank=self.rank,
            source_rank=source[0],
            source_token=source[1],
            field=field,
            against=against,
            rows=rows,
        )


def _first(  # noqa: PLR0913 - names of a place, then the two sides
    stage: str, arm: str, rank: int, field: str, against: str, actual: Tensor, expected: Tensor, wrong: Tensor
) -> Divergence | None:
    if not bool(wrong.any()):
        return None
    row, column = divmod(int(wrong.flatten().int().argmax()), wrong.shape[1])
    return Divergence(
        stage=stage,
        arm=arm,
        rank=rank,
        source_rank=rank if stage == "combine" else None,
        source_token=row if stage == "combine" else None,
        row=row,
        column=column,
        expected_bits=bits_at(expected, row, column),
        actual_bits=bits_at(actual, row, column),
        field=field,
        against=against,
        rows=int(wrong.any(1).sum()),
    )
