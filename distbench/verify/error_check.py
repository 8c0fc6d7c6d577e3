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
from distbench.verify.combine_check import Rider
from distbench.verify.combine_model import Contributions, OwnSlots, Returned, exchanged, key_of, split_key
from distbench.verify.error_bounds import Yardstick, sure
from distbench.verify.error_sample import Load, Sample, SampleRider, own_rows, sample_size, sampled_tokens
from distbench.verify.ideal import ideal_rows
from distbench.verify.ideal_sums import combined, quantised_way
from distbench.verify.records import ArmError
from distbench.verify.row_compare import row_errors, same_bits
from distbench.verify.stage_check import Received
from distbench.workload.inputs import Workload
from distbench.workload.routing import are_local

_FIGURES = 4
_STAGES = 2
_ARMS = 4
_CHOICES = 2
_SIDES: tuple[str, ...] = (Arm.PADDED, Arm.TRUNCATED, Arm.PRODUCTION)
"""Arms whose numbers of rows may select other kernels."""
# Tokens, and expert rows, of each rank that are measured because they are far from the padded arm's.
_MOST_FAR = 4


class _Side(NamedTuple):
    """Yardsticks of the arms with one kernel: the family, the expert rows here, and this rank's own tokens."""

    family: str
    experts: Yardstick
    combine: Yardstick


class Pass(NamedTuple):
    """One arm of a repeat: the rows this rank returned to combine, and combine's output tokens [n, H].

    Where there are some: the keys int64 [l] of rows here that the cut removed, or that the experts were given wrong,
    and a mask of tokens [n] that lost a row to the cut on any rank.
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
        self._weights, self._slots, self._drawn = weights, slots, not workload.recorded
        self._way = quantised_way(facts, weights.w1.shape[2], workload.fp8)
        tests = _FIGURES * _STAGES * arms * _CHOICES * workload.group.ep_size * max(repeats, 1)
        self._sure = sure(tests)
        self._whole = received is not None and sum(workload.tokens_per_rank) <= sample_size(workload, weights)
        self._rider: SampleRider | None = None
        if received is not None and self._whole:
            everything = torch.arange(len(slots.ids), device=workload.device)
            self._sample = Sample(received.keys, received.batch, everything)
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

    def rider(self, passes: Mapping[str, Pass], families: Mapping[str, Roundings], *, alike: bool) -> Rider | None:
        """Return rows of the sample that may travel before `measure` is called with the same arguments, if there are.

        They are those of the first repeat of a case whose sample is all tokens.
        """
        if self._sides or not self._whole:
            return None
        self._begin(passes, families, alike=alike)
        load = self._load(self._sample)

        def take(laid: Contributions) -> list[int]:
            return self._measured(passes, self._sides_of(load, laid, self._sure))

        self._rider = SampleRider(load, self._sample.keys, take)
        return self._rider

    def measure(self, passes: Mapping[str, Pass], families: Mapping[str, Roundings], *, alike: bool) -> None:
        """Measure the arms of a repeat. Collective.

        `families` has the roundings of each arm's kernel; arms with other rows than the padded one are `truncated` and
        `production`. `alike` says, on all ranks or none, that the padded arm's kernel and those of cut rows round
        alike.
        Beside the sample, tokens are measured that are further from the padded arm's than the sample allows.
        """
        self._begin(passes, families, alike=alike)
        rider, self._rider = self._rider, None
        if rider is None or rider.far is None:
            load = None if rider is None else rider.load
            far = self._measured(passes, self._sides or self._make_sides(self._sample, self._sure, load))
            anywhere = self._on_any_rank(value=bool(far))
        else:
            far, anywhere = rider.far, rider.anywhere
        if anywhere:
            chosen = self._chosen(far)
            everyone = passes if self._padded is None else {Arm.PADDED: self._padded, **passes}
            self._measure_sample(everyone, *chosen, only_outside=True)

    def _begin(self, passes: Mapping[str, Pass], families: Mapping[str, Roundings], *, alike: bool) -> None:
        self._families |= families
        self._alike = alike
        self._padded = self._padded or passes.get(Arm.PADDED)

    def _measured(self, passes: Mapping[str, Pass], sides: dict[str, _Side]) -> list[int]:
        """Measure the sample; return the keys of tokens that are further from the padded arm's than it allows."""
        self._sides = sides
        self._measure_sample(passes, self._sample, sides)
        return [key for arm, one in passes.items() for key in self._far(arm, one)]

    def error_of(self, arm: str, tokens: Tensor) -> ArmError | None:
        """Return the error of this rank's tokens [n, H] where `arm` ran again and lost none. Collective.

        None without a sample, unless tokens that are far from the padded arm's are outside their bounds.
        """
        found = self._token_error(arm, tokens, self._sample, self._sides)
        keys = self._far(arm, Pass(None, tokens, None, None))
        anywhere = self._on_any_rank(value=bool(keys))
        far = self._token_error(arm, tokens, *self._chosen(keys)) if anywhere else None
        return far if far is not None and (found is None or (found.within and not far.within)) else found

    def _measure_sample(
        self, passes: Mapping[str, Pass], sample: Sample, sides: Mapping[str, _Side], *, only_outside: bool = False
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
                (Stage.COMBINE, side.combine, own_rows(one.tokens, sample), kept_tokens),
            )
            for stage, yardstick, actual, kept in stages:
                before = self._found.get((arm, stage))
                if actual is None or not yardstick.rows or (before is not None and not before.within):
                    continue
                error = _error_of_kept(arm, stage, side.family, yardstick, actual, kept, known)
                if error is not None and not (only_outside and error.within and before is not None):
                    self._found[arm, stage] = error

    def _token_error(self, arm: str, tokens: Tensor, sample: Sample, sides: Mapping[str, _Side]) -> ArmError | None:
        if not len(sample.own) or not sides:
            return None
        side = _side(sides, arm)
        return _error(arm, Stage.COMBINE, side.family, side.combine, own_rows(tokens, sample))

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

    def _chosen(self, keys: Sequence[int]) -> tuple[Sample, dict[str, _Side]]:
        """Return the tokens that any rank names, and what they must be. Collective.

        They are chosen for their results: bounds hold for any choice of as many of the case's tokens.
        """
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

    def _sample_of(self, ranks: Tensor, tokens: Tensor) -> Sample:
        """Return the sample of some tokens int64 [s], by rank and token."""
        workload = self._workload
        experts = workload.experts_of(ranks, tokens)
        here = are_local(experts, self._rank, workload.experts_per_rank).any(1)
        rows = workload.token_rows(ranks[here], tokens[here])
        return Sample(key_of(ranks, tokens)[here], rows, tokens[ranks == self._rank])

    def allowed_between(self, arm: str, stage: str) -> float | None:
        """Return the bound on the distance of two runs of an arm's kernel in a row, as a share of its largest value.

        Each run may differ from float64 by the loosest bound of the sample. None without a sample.
        """
        if not self._sides:
            return None
        side = _side(self._sides, arm)
        yardstick = side.experts if stage == Stage.EXPERTS else side.combine
        return 2 * yardstick.loosest if yardstick.rows else None

    def _make_sides(self, sample: Sample, sure_of: float, load: Load | None = None) -> dict[str, _Side]:
        """Compute what a sample must be, by kernel; `load` is this rank's part, if known. Collective."""
        load = load or self._load(sample)
        return self._sides_of(load, self._to_owners(load.packed(), sample), sure_of)

    def _load(self, sample: Sample) -> Load:
        """Compute the rows of a sample, by kernel.

        There is one part for each kernel that the case has, also where a cut that is wrong gave one of them another
        number of rows, and so another family.
        """
        sides = [side for side in _SIDES if side in self._families]
        measured = {side: self._families[side] for side in (sides[:1] if self._alike else sides)}
        distinct = list(dict.fromkeys(measured.values()))
        exact, made_here = ideal_rows(sample.batch, self._weights, distinct)
        by_family = dict(zip(distinct, made_here, strict=True))
        ideals = [by_family[family] for family in measured.values()]
        parts = [exact, *(part for one in ideals for part in (one.rows, one.variance.bfloat16(), one.order))]
        return Load(sides, measured, exact, ideals, parts)

    def _sides_of(self, load: Load, laid: Contributions, sure_of: float) -> dict[str, _Side]:
        """Return what a sample must be: this rank's rows, and its tokens, whose packed rows are laid by slot."""
        sent, exact = load.parts, load.exact
        widths = [part.shape[1] * part.element_size() for part in sent]
        arrived = [
            Contributions(raw.clone(memory_format=torch.contiguous_format).view(part.dtype), laid.ranks)
            for raw, part in zip(laid.rows.view(torch.uint8).split(widths, dim=2), sent, strict=True)
        ]
        wide = _exact_sum(arrived[0])
        made = {}
        parts = zip(arrived[1::3], arrived[2::3], arrived[3::3], strict=True)
        sides = zip(load.measured.items(), load.ideals, parts, strict=True)
        for (side, family), ideal, (rows, variances, by_order) in sides:
            tokens = combined(rows, variances, by_order, self._slots.order, self._way)
            yardsticks = (Yardstick(*one, sure_of, drawn=self._drawn) for one in ((exact, ideal), (wide, tokens)))
            made[side] = _Side(family.name, *yardsticks)
        return {side: made.get(side, made[load.sides[0]]) for side in load.sides}

    def _to_owners(self, packed: Tensor, sample: Sample) -> Contributions:
        """Send the sample's packed rows uint8 [m, b] to the tokens' owners, arranged by slot. Collective."""
        slots = self._slots.of(sample.own)
        leaving = torch.bincount(sample.keys >> 32, minlength=len(slots.arriving))
        return slots.arranged(exchanged(self._exchange, self._rank, packed, leaving.tolist(), slots.arriving))


def _side(sides: Mapping[str, _Side], arm: str) -> _Side:
    return sides[arm if arm in _SIDES else Arm.PADDED]


def _rows(returned: Returned | None, sample: Sample) -> Tensor | None:
    """Return this rank's expert rows of the sample; None where its received rows are unknown."""
    if returned is None or not len(sample.keys):
        return None
    if torch.equal(returned.keys, sample.keys):
        return returned.rows
    places = torch.searchsorted(returned.keys, sample.keys).clamp(max=max(len(returned.keys) - 1, 0))
    if not len(returned.keys) or not torch.equal(returned.keys[places], sample.keys):
        return None
    return returned.rows.index_select(0, places)


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


def _error(arm: str, stage: str, family: str, yardstick: Yardstick, rows: Tensor) -> ArmError:
    return ArmError(arm=arm, stage=stage, family=family, **yardstick.measure(rows)._asdict())


def _exact_sum(contributions: Contributions) -> Tensor:
    return contributions.rows.double().sum(1).float()
