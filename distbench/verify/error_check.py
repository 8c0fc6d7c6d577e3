"""Errors of sampled rows and tokens relative to ideal roundings, by arm and stage (docs/gaussian.md).

A keyed hash samples the same tokens on all ranks. Each rank computes its experts' rows of them from the rows that must
have travelled (`verify.stages` compares these with the received ones), with the same weights as its kernels. The rows
go to the tokens' owners, who add them up as combine does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.exchange.base import Exchange
from distbench.experts.roundings import Roundings
from distbench.layer import ExpertWeights
from distbench.verify.bitwise import same_bits
from distbench.verify.error_bounds import Yardstick, sure
from distbench.verify.ideal import ideal_rows
from distbench.verify.ideal_sums import combined, quantised_way
from distbench.verify.records import ArmError
from distbench.verify.sums import (
    Contributions,
    Returned,
    exchanged,
    in_slot_order,
    key_of,
    sum_order,
)
from distbench.workload.batch import TokenBatch
from distbench.workload.bits import positive_words
from distbench.workload.inputs import Workload
from distbench.workload.routing import destinations, recv_counts, token_keys

_MOST_TOKENS = 256
_MOST_ON_CPU, _LEAST_TOKENS = 128, 48
_CPU_OPERATIONS = 4e10
_FIGURES = 4
_STAGES = 2
_ARMS = 4


class _Sample(NamedTuple):
    """Sampled tokens of all ranks that have an expert here, by (rank, token): keys [m], and their rows."""

    keys: Tensor
    batch: TokenBatch


class _Side(NamedTuple):
    """Yardsticks of the arms with one kernel: the family, the expert rows here, and this rank's own tokens."""

    family: str
    experts: Yardstick
    combine: Yardstick


class Pass(NamedTuple):
    """One arm of a repeat: the rows this rank returned to combine, and combine's output tokens [n, H].

    Where the cut removed rows: the keys int64 [l] of those lost here, and a mask of tokens [n] that lost one on any
    rank.
    """

    returned: Returned | None
    tokens: Tensor
    lost_rows: Tensor | None
    lost_tokens: Tensor | None


class ErrorChecker:
    """Measures the passes of one case on one rank; every rank of the group makes one, and makes the same calls."""

    def __init__(  # noqa: PLR0913 - the inputs of the measurement
        self,
        exchange: Exchange,
        workload: Workload,
        rank: int,
        ids: Tensor,
        weights: ExpertWeights,
        facts: Mapping[str, Any],
        repeats: int,
    ) -> None:
        """`ids` [n, k] are this rank's own, `facts` the transport's; each arm is measured `repeats` times at most."""
        self._exchange, self._workload, self._rank = exchange, workload, rank
        self._weights, self._order = weights, sum_order(facts)
        self._way = quantised_way(facts, weights.w1.shape[2], workload.fp8)
        tests = _FIGURES * _STAGES * _ARMS * workload.group.ep_size * max(repeats, 1)
        self._sure = sure(tests)
        ranks, tokens = sampled_tokens(workload, weights)
        experts = workload.experts_of(ranks, tokens)
        here = destinations(experts, workload.experts_per_rank, workload.group.ep_size)[:, rank]
        self._sample = _Sample(key_of(ranks, tokens)[here], workload.token_rows(ranks[here], tokens[here]))
        self._own = tokens[ranks == rank]
        self._own_ids = ids[self._own]
        self._sides: dict[str, _Side] = {}
        self._found: dict[tuple[str, str], ArmError] = {}

    @property
    def found(self) -> list[ArmError]:
        """Measured errors of each arm and stage: the first outside its bounds, else the last."""
        return list(self._found.values())

    def measure(self, passes: Mapping[str, Pass], families: Mapping[str, Roundings]) -> None:
        """Measure the arms of a repeat. Collective.

        `families` has the roundings of each arm's kernel; arms whose rows differ from padded's use the `truncated` one.
        """
        if not self._sides:
            self._sides = self._make_sides(families)
        known: dict[tuple[str, str], list[tuple[Tensor, ArmError]]] = {}
        for arm, one in passes.items():
            side = self._side(arm)
            rows = self._rows(one.returned)
            if rows is not None:
                kept = None if one.lost_rows is None else ~torch.isin(self._sample.keys, one.lost_rows)
                self._keep(arm, "experts", side.family, side.experts, rows, kept, known)
            kept = None if one.lost_tokens is None else ~one.lost_tokens.to(self._own.device)[self._own]
            self._keep(arm, "combine", side.family, side.combine, one.tokens[self._own], kept, known)

    def error_of(self, arm: str, tokens: Tensor) -> ArmError | None:
        """Return the error of this rank's tokens [n, H] of a lossless second run of `arm`; None without a sample."""
        if not len(self._own) or not self._sides:
            return None
        side = self._side(arm)
        return _error(arm, "combine", side.family, side.combine, tokens[self._own])

    def allowed_between(self, arm: str, stage: str) -> float | None:
        """Return the bound on the distance of two runs of an arm's kernel in a row, as a share of its largest value.

        Each run may differ from float64 by the loosest bound of the sample. None without a sample.
        """
        if not self._sides:
            return None
        side = self._side(arm)
        yardstick = side.experts if stage == "experts" else side.combine
        return 2 * yardstick.loosest if yardstick.rows else None

    def _side(self, arm: str) -> _Side:
        return self._sides["truncated" if arm == "truncated" else "padded"]

    def _rows(self, returned: Returned | None) -> Tensor | None:
        """Return this rank's expert rows of the sample; None where the received rows are unknown."""
        if returned is None or not len(self._sample.keys):
            return None
        places = torch.searchsorted(returned.keys, self._sample.keys).clamp(max=max(len(returned.keys) - 1, 0))
        if not len(returned.keys) or not torch.equal(returned.keys[places], self._sample.keys):
            return None
        return returned.rows[places]

    def _keep(  # noqa: PLR0913 - the measurement, its yardstick and its place
        self,
        arm: str,
        stage: str,
        family: str,
        yardstick: Yardstick,
        rows: Tensor,
        kept: Tensor | None,
        known: dict[tuple[str, str], list[tuple[Tensor, ArmError]]],
    ) -> None:
        """Keep the arm's error unless one outside its bounds is kept already; identical bits are measured once."""
        before = self._found.get((arm, stage))
        if not yardstick.rows or (before is not None and not before.within):
            return
        if kept is not None and not bool(kept.all()):
            yardstick, rows = yardstick.part(kept), rows[kept]
            if len(rows):
                self._found[arm, stage] = _error(arm, stage, family, yardstick, rows)
            return
        alike = known.setdefault((stage, family), [])
        found = next((error for other, error in alike if same_bits(other, rows)), None)
        if found is None:
            found = _error(arm, stage, family, yardstick, rows)
            alike.append((rows, found))
        self._found[arm, stage] = msgspec.structs.replace(found, arm=arm)

    def _make_sides(self, families: Mapping[str, Roundings]) -> dict[str, _Side]:
        """Compute the expected outputs, by kernel. Collective."""
        by_side = {side: families[side] for side in ("padded", "truncated") if side in families}
        distinct = list(dict.fromkeys(by_side.values()))
        exact, ideals = ideal_rows(self._sample.batch, self._weights, distinct)
        arrived = self._to_owners(
            [exact, *(part for ideal in ideals for part in (ideal.rows, ideal.variance.bfloat16()))]
        )
        wide = _exact_sum(arrived[0])
        made = {}
        for family, ideal, rows, variances in zip(distinct, ideals, arrived[1::2], arrived[2::2], strict=True):
            tokens = combined(rows, variances, self._order, self._way)
            made[family] = _Side(family.name, Yardstick(exact, ideal, self._sure), Yardstick(wide, tokens, self._sure))
        return {side: made[family] for side, family in by_side.items()}

    def _to_owners(self, parts: list[Tensor]) -> list[Contributions]:
        """Send the sample's rows [m, .] of each of `parts` to the tokens' owners, arranged by slot. Collective."""
        group = self._workload.group
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        leaving = torch.bincount(self._sample.keys >> 32, minlength=group.ep_size)
        arriving = recv_counts(self._own_ids, group.experts_per_rank, group.ep_size)
        rows = exchanged(self._exchange, self._rank, packed, leaving.tolist(), arriving.tolist())
        laid = in_slot_order(rows, self._own_ids, group, self._order)
        widths = [part.shape[1] * part.element_size() for part in parts]
        return [
            Contributions(raw.contiguous().view(part.dtype), laid.ranks)
            for raw, part in zip(laid.rows.split(widths, dim=2), parts, strict=True)
        ]


def sampled_tokens(workload: Workload, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Return the source ranks and tokens of the sample, int64 [s] each, sorted; the same on every rank."""
    device = workload.device
    counts = torch.tensor(workload.tokens_per_rank, device=device)
    ranks = torch.arange(len(counts), device=device).repeat_interleave(counts)
    tokens = torch.arange(len(ranks), device=device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    most = _sample_size(workload, weights)
    if len(ranks) <= most:
        return ranks, tokens
    order = positive_words(workload.seed, "errors", token_keys(ranks, tokens), 1, device).squeeze(1)
    chosen = order.argsort(stable=True)[:most].sort().values
    return ranks[chosen], tokens[chosen]


def _sample_size(workload: Workload, weights: ExpertWeights) -> int:
    """Return the number of sampled tokens: hundreds, fewer where a CPU would take seconds."""
    if workload.device.type != "cpu":
        return _MOST_TOKENS
    operations = 8 * workload.group.topk * (weights.w1[0].numel() + weights.w2[0].numel())
    return max(min(int(_CPU_OPERATIONS / operations), _MOST_ON_CPU), _LEAST_TOKENS)


def _error(arm: str, stage: str, family: str, yardstick: Yardstick, rows: Tensor) -> ArmError:
    return ArmError(arm=arm, stage=stage, family=family, **yardstick.measure(rows)._asdict())


def _exact_sum(contributions: Contributions) -> Tensor:
    return contributions.rows.double().sum(1).float()
