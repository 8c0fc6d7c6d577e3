"""What one rank checks in every pass: received rows against their sources, expert rows and tokens against the oracle.

The final bits alone would miss damage that a later rounding hides, so each stage is held against what it should be.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.truncation import ExpertInput
from distbench.verify.bitwise import bits_at, differing, same_bits
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
        keys, order = ((sources[:, 0] << 32) | sources[:, 1]).sort()
        if self._known is None or not torch.equal(self._known.keys, keys):
            broken = self._learn(arm, sources, keys)
            if broken is not None:
                return broken
        if self._known is None:
            return None
        live = min(int(given.num_local_tokens), given.rows)
        place = _Place(arm, self._rank, sources, order, None if live >= len(keys) else order < live)
        received = TokenBatch(given.hidden, given.scales, given.weights, given.ids)
        for field, actual, expected in zip(TokenBatch._fields, received, self._known.batch, strict=True):
            if actual is not None and expected is not None:
                wrong = place.first_difference("dispatch", field, "source", actual, expected)
                if wrong is not None:
                    return wrong
        return self._check_expert_rows(place, self._known.expert_rows, expert_out)

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
        return _first("combine", arm, self._rank, "tokens", "oracle", combined, expected)

    def _learn(self, arm: str, sources: Tensor, keys: Tensor) -> Divergence | None:
        """Take `sources` as those of this case, and make what must lie there, unless they are not as agreed."""
        agreed = self._counts[:, self._rank]
        num_ranks = len(agreed)
        tokens = torch.tensor(self._workload.tokens_per_rank, device=sources.device)
        below = sources[:, 1] < tokens[sources[:, 0].clamp(0, num_ranks - 1)]
        inside = bool((sources >= 0).all() and (sources[:, 0] < num_ranks).all() and below.all())
        doubled = int((keys[1:] == keys[:-1]).sum())
        if not inside or doubled or not torch.equal(torch.bincount(sources[:, 0], minlength=num_ranks).cpu(), agreed):
            against = f"{agreed.tolist()} rows from each rank, each token once"
            return self._misplaced(arm, against, rows=max(abs(int(agreed.sum()) - len(keys)), doubled, 1))
        batch = self._workload.token_rows(keys >> 32, keys & 0xFFFF_FFFF)
        belongs = destinations(batch.ids, self._workload.experts_per_rank, num_ranks)[:, self._rank]
        if not bool(belongs.all()):
            return self._misplaced(arm, "the routing", rows=int((~belongs).sum()))
        self._known = _Received(keys, batch, self._workload.expected_rows(self._rank, batch))
        return None

    def _misplaced(self, arm: str, against: str, rows: int) -> Divergence:
        return Divergence(stage="dispatch", arm=arm, rank=self._rank, field="sources", against=against, rows=rows)

    def _check_expert_rows(self, place: _Place, expected: Tensor | None, expert_out: Tensor) -> Divergence | None:
        if expected is not None:
            return place.first_difference("experts", "rows", "oracle", expert_out, expected)
        if self._baseline_rows is None:
            self._baseline_rows = expert_out[place.order]
            return None
        return place.first_difference("experts", "rows", "padded", expert_out, self._baseline_rows)


class _Place(NamedTuple):
    """Where rows stand: `order` [m] slots in canonical order; `visible` [m] those that a cut left, None for all."""

    arm: str
    rank: int
    sources: Tensor
    order: Tensor
    visible: Tensor | None

    def first_difference(
        self, stage: str, field: str, against: str, actual: Tensor, expected: Tensor
    ) -> Divergence | None:
        slots = self.order
        if self.visible is not None:
            slots, expected = slots[self.visible], expected[self.visible]
        found = _first(stage, self.arm, self.rank, field, against, actual[slots], expected)
        if found is None or found.row is None:
            return found
        slot = int(slots[found.row])
        source_rank, source_token = self.sources[slot].tolist()
        return msgspec.structs.replace(found, row=slot, source_rank=source_rank, source_token=source_token)


def _first(  # noqa: PLR0913 - names of a place, then the two sides
    stage: str, arm: str, rank: int, field: str, against: str, actual: Tensor, expected: Tensor
) -> Divergence | None:
    if same_bits(actual, expected):
        return None
    wrong = differing(actual, expected)
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
