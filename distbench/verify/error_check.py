"""Errors of sampled rows and tokens relative to ideal roundings, by arm and stage (docs/gaussian.md).

A keyed hash samples the same tokens on all ranks. Each rank computes its experts' rows of them from the rows that must
have travelled (`verify.stage_check` compares these with the received ones), with the same weights as its kernels. The
rows go to the tokens' owners, who add them up as combine does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case.stages import Arm, Stage
from distbench.distributed.exchange import Exchange
from distbench.distributed.session import Session
from distbench.distributed.waits import collective
from distbench.experts.base import ExpertWeights
from distbench.experts.roundings import Roundings
from distbench.verify.combine_model import Contributions, OwnSlots, Returned, exchanged, key_of, split_key
from distbench.verify.error_bounds import Yardstick, sure
from distbench.verify.ideal import ideal_rows
from distbench.verify.ideal_sums import combined, quantised_way
from distbench.verify.records import ArmError
from distbench.verify.row_compare import row_errors, same_bits
from distbench.verify.stage_check import Received
from distbench.workload.batch import TokenBatch
from distbench.workload.bits import positive_words
from distbench.workload.inputs import Workload
from distbench.workload.routing import are_local, token_keys

_MOST_TOKENS = 256
_MOST_ON_CPU, _LEAST_TOKENS = 128, 48
_CPU_OPERATIONS = 4e10
_FIGURES = 4
_STAGES = 2
_ARMS = 4
_CHOICES = 2
_SIDES: tuple[str, ...] = (Arm.PADDED, Arm.TRUNCATED, Arm.PRODUCTION)
"""Arms whose numbers of rows may select other kernels."""
# Tokens, and expert rows, of each rank that are measured because they are far from the padded arm's.
_MOST_FAR = 4


class _Sample(NamedTuple):
    """Sampled tokens of all ranks that have an expert here, by (rank, token): keys [m], and their rows.

    `own` [s] are this rank's tokens.
    """

    keys: Tensor
    batch: TokenBatch
    own: Tensor


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
        session: Session,
        exchange: Exchange,
        workload: Workload,
        slots: OwnSlots,
        weights: ExpertWeights,
        facts: Mapping[str, Any],
        repeats: int,
        arms: int = _ARMS,
        received: Received | None = None,
    ) -> None:
        """`slots` are this rank's own, `facts` the transport's; `arms` arms are measured `repeats` times at most.

        `received` are the rows that the routing sends here, where they are known before they arrive.
        """
        self._group, self._on_any_rank = session.group, session.on_any_rank
        self._exchange, self._workload, self._rank = exchange, workload, session.rank
        self._weights, self._slots = weights, slots
        self._way = quantised_way(facts, weights.w1.shape[2], workload.fp8)
        tests = _FIGURES * _STAGES * arms * _CHOICES * workload.group.ep_size * max(repeats, 1)
        self._sure = sure(tests)
        if received is not None and sum(workload.tokens_per_rank) <= _sample_size(workload, weights):
            everything = torch.arange(len(slots.ids), device=workload.device)
            self._sample = _Sample(received.keys, received.batch, everything)
        else:
            self._sample = self._sample_of(*sampled_tokens(workload, weights))
        self._families: dict[str, Roundings] = {}
        self._alike = False
        self._padded: Pass | None = None
        self._sides: dict[str, _Side] = {}
        self._found: dict[tuple[str, str], ArmError] = {}

    @property
    def found(self) -> list[ArmError]:
        """Measured errors of each arm and stage: the first outside its bounds, else the last."""
        return list(self._found.values())

    def measure(self, passes: Mapping[str, Pass], families: Mapping[str, Roundings], *, alike: bool) -> None:
        """Measure the arms of a repeat. Collective.

        `families` has the roundings of each arm's kernel; arms with other rows than the padded one are `truncated` and
        `production`. `alike` says, on all ranks or none, that the padded arm's kernel and those of cut rows round
        alike.
        Beside the sample, tokens are measured that are further from the padded arm's than the sample allows.
        """
        self._families |= families
        self._alike = alike
        self._padded = self._padded or passes.get(Arm.PADDED)
        if not self._sides:
            self._sides = self._make_sides(self._sample, self._sure)
        self._measure_sample(passes, self._sample, self._sides)
        chosen = self._chosen([key for arm, one in passes.items() for key in self._far(arm, one)])
        if chosen is not None:
            everyone = passes if self._padded is None else {Arm.PADDED: self._padded, **passes}
            self._measure_sample(everyone, *chosen, only_outside=True)

    def error_of(self, arm: str, tokens: Tensor) -> ArmError | None:
        """Return the error of this rank's tokens [n, H] where `arm` ran again and lost none. Collective.

        None without a sample, unless tokens that are far from the padded arm's are outside their bounds.
        """
        found = self._token_error(arm, tokens, self._sample, self._sides)
        chosen = self._chosen(self._far(arm, Pass(None, tokens, None, None)))
        far = None if chosen is None else self._token_error(arm, tokens, *chosen)
        return far if far is not None and (found is None or (found.within and not far.within)) else found

    def _measure_sample(
        self, passes: Mapping[str, Pass], sample: _Sample, sides: Mapping[str, _Side], *, only_outside: bool = False
    ) -> None:
        known: dict[tuple[str, str], list[tuple[Tensor, ArmError]]] = {}
        for arm, one in passes.items():
            side = _side(sides, arm)
            rows = _rows(one.returned, sample)
            lost = one.lost_rows, one.lost_tokens
            kept_rows = None if lost[0] is None or not len(lost[0]) else ~torch.isin(sample.keys, lost[0])
            kept_tokens = None if lost[1] is None else ~lost[1].to(sample.own.device)[sample.own]
            stages = (
                (Stage.EXPERTS, side.experts, rows, kept_rows),
                (Stage.COMBINE, side.combine, _own_rows(one.tokens, sample), kept_tokens),
            )
            for stage, yardstick, actual, kept in stages:
                before = self._found.get((arm, stage))
                if actual is None or not yardstick.rows or (before is not None and not before.within):
                    continue
                error = _error_of_kept(arm, stage, side.family, yardstick, actual, kept, known)
                if error is not None and not (only_outside and error.within and before is not None):
                    self._found[arm, stage] = error

    def _token_error(self, arm: str, tokens: Tensor, sample: _Sample, sides: Mapping[str, _Side]) -> ArmError | None:
        if not len(sample.own) or not sides:
            return None
        side = _side(sides, arm)
        return _error(arm, Stage.COMBINE, side.family, side.combine, _own_rows(tokens, sample))

    def _far(self, arm: str, one: Pass) -> list[int]:
        """Return keys of tokens that are further from the padded arm's than the sample allows, the worst first."""
        padded = self._padded
        if padded is None or one is padded:
            return []
        kept = None if one.lost_tokens is None else ~one.lost_tokens.to(one.tokens.device)
        far = self._furthest(arm, Stage.COMBINE, one.tokens, padded.tokens, kept)
        keys = [] if far is None else key_of(torch.full_like(far, self._rank), far).tolist()
        mine, right = one.returned, padded.returned
        if mine is None or right is None or mine.rows is right.rows or not torch.equal(mine.keys, right.keys):
            return keys
        kept = None if one.lost_rows is None else ~torch.isin(mine.keys, one.lost_rows)
        far = self._furthest(arm, Stage.EXPERTS, mine.rows, right.rows, kept)
        return keys if far is None else keys + mine.keys[far].tolist()

    def _furthest(self, arm: str, stage: str, rows: Tensor, padded: Tensor, kept: Tensor | None) -> Tensor | None:
        """Return up to `_MOST_FAR` rows int64 [f] further from the padded arm's than allowed, the worst first.

        None for no row.
        """
        if same_bits(rows, padded):
            return None
        errors = row_errors(rows, padded).nan_to_num(math.inf)
        errors = errors if kept is None else errors.masked_fill(~kept, 0.0)
        allowed = self.allowed_between(arm, stage) or 0.0
        if float(errors.amax()) <= allowed:
            return None
        order = errors.argsort(descending=True, stable=True)[:_MOST_FAR]
        return order[errors[order] > allowed]

    def _chosen(self, keys: Sequence[int]) -> tuple[_Sample, dict[str, _Side]] | None:
        """Return the tokens that any rank names, and what they must be; None where no rank names one. Collective.

        They are chosen for their results: bounds hold for any choice of as many of the case's tokens.
        """
        if not self._on_any_rank(value=bool(keys)):
            return None
        table = torch.full((2 * _MOST_FAR,), -1, dtype=torch.int64, device=self._slots.ids.device)
        few = list(dict.fromkeys(keys))[: len(table)]
        table[: len(few)] = torch.tensor(few, dtype=torch.int64)
        everyone = [torch.empty_like(table) for _ in range(dist.get_world_size(self._group))]
        with collective("all_gather", table.get_device()):
            dist.all_gather(everyone, table, group=self._group)
        found = torch.cat(everyone).unique()
        found = found[found >= 0]
        sample = self._sample_of(*split_key(found))
        choices = 2 * len(found) * math.log(max(sum(self._workload.tokens_per_rank), 1))
        return sample, self._make_sides(sample, math.sqrt(self._sure**2 + choices))

    def _sample_of(self, ranks: Tensor, tokens: Tensor) -> _Sample:
        """Return the sample of some tokens int64 [s], by rank and token."""
        workload = self._workload
        experts = workload.experts_of(ranks, tokens)
        here = are_local(experts, self._rank, workload.experts_per_rank).any(1)
        rows = workload.token_rows(ranks[here], tokens[here])
        return _Sample(key_of(ranks, tokens)[here], rows, tokens[ranks == self._rank])

    def allowed_between(self, arm: str, stage: str) -> float | None:
        """Return the bound on the distance of two runs of an arm's kernel in a row, as a share of its largest value.

        Each run may differ from float64 by the loosest bound of the sample. None without a sample.
        """
        if not self._sides:
            return None
        side = _side(self._sides, arm)
        yardstick = side.experts if stage == Stage.EXPERTS else side.combine
        return 2 * yardstick.loosest if yardstick.rows else None

    def _make_sides(self, sample: _Sample, sure_of: float) -> dict[str, _Side]:
        """Compute the expected rows and tokens of a sample, by kernel. Collective.

        Ranks exchange one part for each kernel that the case has, also where a cut that is wrong gave one of them
        another number of rows, and so another family.
        """
        sides = [side for side in _SIDES if side in self._families]
        measured = {side: self._families[side] for side in (sides[:1] if self._alike else sides)}
        distinct = list(dict.fromkeys(measured.values()))
        exact, made_here = ideal_rows(sample.batch, self._weights, distinct)
        by_family = dict(zip(distinct, made_here, strict=True))
        ideals = [by_family[family] for family in measured.values()]
        arrived = self._to_owners(
            [exact, *(part for one in ideals for part in (one.rows, one.variance.bfloat16(), one.order))], sample
        )
        wide = _exact_sum(arrived[0])
        made = {}
        parts = zip(arrived[1::3], arrived[2::3], arrived[3::3], strict=True)
        for (side, family), ideal, (rows, variances, by_order) in zip(measured.items(), ideals, parts, strict=True):
            tokens = combined(rows, variances, by_order, self._slots.order, self._way)
            made[side] = _Side(family.name, Yardstick(exact, ideal, sure_of), Yardstick(wide, tokens, sure_of))
        return {side: made.get(side, made[sides[0]]) for side in sides}

    def _to_owners(self, parts: list[Tensor], sample: _Sample) -> list[Contributions]:
        """Send the sample's rows [m, .] of each of `parts` to the tokens' owners, arranged by slot. Collective."""
        slots = self._slots.of(sample.own)
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        leaving = torch.bincount(sample.keys >> 32, minlength=len(slots.arriving))
        laid = slots.arranged(exchanged(self._exchange, self._rank, packed, leaving.tolist(), slots.arriving))
        widths = [part.shape[1] * part.element_size() for part in parts]
        return [
            Contributions(raw.contiguous().view(part.dtype), laid.ranks)
            for raw, part in zip(laid.rows.split(widths, dim=2), parts, strict=True)
        ]


def _side(sides: Mapping[str, _Side], arm: str) -> _Side:
    return sides[arm if arm in _SIDES else Arm.PADDED]


def _rows(returned: Returned | None, sample: _Sample) -> Tensor | None:
    """Return this rank's expert rows of the sample; None where its received rows are unknown."""
    if returned is None or not len(sample.keys):
        return None
    if torch.equal(returned.keys, sample.keys):
        return returned.rows
    places = torch.searchsorted(returned.keys, sample.keys).clamp(max=max(len(returned.keys) - 1, 0))
    if not len(returned.keys) or not torch.equal(returned.keys[places], sample.keys):
        return None
    return returned.rows.index_select(0, places)


def _own_rows(tokens: Tensor, sample: _Sample) -> Tensor:
    """Return the sample's rows of this rank's tokens [n, H]; without a copy where they are all."""
    return tokens if len(sample.own) == len(tokens) else tokens.index_select(0, sample.own)


def _error_of_kept(  # noqa: PLR0913 - what is measured, by what, and what is known
    arm: str,
    stage: str,
    family: str,
    yardstick: Yardstick,
    rows: Tensor,
    kept: Tensor | None,
    known: dict[tuple[str, str], list[tuple[Tensor, ArmError]]],
) -> ArmError | None:
    """Return the error of the rows `kept`, bool [n] or None for all; the same bits are measured once."""
    if kept is not None and not bool(kept.all()):
        return _error(arm, stage, family, yardstick.part(kept), rows[kept]) if bool(kept.any()) else None
    alike = known.setdefault((stage, family), [])
    found = next((error for other, error in alike if same_bits(other, rows)), None)
    if found is None:
        found = _error(arm, stage, family, yardstick, rows)
        alike.append((rows, found))
    return msgspec.structs.replace(found, arm=arm)


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
