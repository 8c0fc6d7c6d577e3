"""One rank's checks in every pass: received rows against their sources, expert rows against the oracle.

The final bits alone would miss damage that a later rounding hides, so each stage has its own reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.case.stages import Arm, Stage
from distbench.experts.base import ExpertInput
from distbench.transport.base import Dispatched
from distbench.verify.changes import OVERWRITTEN, Looks
from distbench.verify.combine_model import Returned, key_of, split_key
from distbench.verify.damage_patterns import far_sources, pattern_of
from distbench.verify.records import FINITE, LISTED_TOKENS, ORACLE, Divergence, Evidence, WrongRow
from distbench.verify.row_compare import (
    differing,
    far_rows,
    first_difference,
    row_digests,
    same_bits,
    same_bits_each,
)
from distbench.verify.tolerances import FP8_TOLERANCE, TOLERANCE
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload
from distbench.workload.routing import are_local, destinations, local_slots
from distbench.workload.routing_spec import ExpertGroup


class Received(NamedTuple):
    """Received rows sorted by (source rank, source token): keys [m], expected contents, and expert rows."""

    keys: Tensor
    batch: TokenBatch
    expert_rows: Tensor | None


def foreseen(workload: Workload, rank: int, own: TokenBatch) -> tuple[Tensor | None, Received | None]:
    """Return combine's expected outputs for the tokens `own` of `rank`, and the rows that it receives.

    One oracle serves both, for half of its cost. The rows are None where the case is large.
    """
    arriving = workload.arriving(rank)
    if arriving is None:
        return workload.expected(own), None
    ranks, numbers, batch = arriving
    tokens, rows = workload.expected_together(rank, own, ranks, batch)
    return tokens, Received(key_of(ranks, numbers), batch, rows)


class Counts(NamedTuple):
    """Numbers of rows of a pass: received by dispatch, and live for the experts; `left` once they ran."""

    total: int
    live: int
    left: int


def counts_of(dispatched: Dispatched, given: ExpertInput, looks: Looks) -> Counts:
    """Return the counts of a pass; the host waits for a device once."""
    counts = (*looks.counts(dispatched, given), given.num_local_tokens)
    if dispatched.total_recv.is_cpu:
        return Counts(*map(int, counts))
    return Counts(*torch.cat(counts).tolist())


class Span(NamedTuple):
    """Some tokens of each rank: those from `first` up to `past`."""

    first: tuple[int, ...]
    past: tuple[int, ...]

    def holds(self, sources: Tensor) -> bool:
        """Whether all (source rank, source token) of `sources` [m, 2] are among these tokens."""
        ranks, tokens = sources.unbind(1)
        if not bool(((ranks >= 0) & (ranks < len(self.first))).all()):
            return False
        first, past = (torch.tensor(one, device=sources.device)[ranks] for one in self)
        return bool(((tokens >= first) & (tokens < past)).all())

    def of(self, received: Received | None) -> Received | None:
        """The received rows whose tokens are among these."""
        if received is None:
            return None
        keys, (hidden, scales, weights, ids), rows = received
        ranks, tokens = split_key(keys)
        first, past = (torch.tensor(one, device=keys.device)[ranks] for one in self)
        here = (tokens >= first) & (tokens < past)
        batch = TokenBatch(hidden[here], None if scales is None else scales[here], weights[here], ids[here])
        return Received(keys[here], batch, None if rows is None else rows[here])


class _Baseline(NamedTuple):
    """Expert rows [m, H] of the first pass, and a mask [m] of those with right inputs; None for all."""

    rows: Tensor
    fit: Tensor | None


class StageChecker:
    """Checks the passes of one case on one rank; the first pass seen is the baseline of the others."""

    def __init__(  # noqa: PLR0913 - the case's facts
        self,
        workload: Workload,
        rank: int,
        counts: Tensor,
        capacity: int,
        foreseen: Received | None = None,
        span: Span | None = None,
        *,
        local_slots_only: bool = False,
    ) -> None:
        """Keep the parts; `counts` int64 [W, W]: agreed rows from rank i to j; a receive buffer has `capacity` rows.

        `foreseen` are the rows that the routing sends here, where they are known before they arrive. `span` are the
        tokens that the passes move; None for all. `local_slots_only` says which slots arrive: see
        `Transport.local_slots`.
        """
        self._local_slots_only = local_slots_only
        self._span = span or Span((0,) * len(counts), workload.tokens_per_rank)
        self._workload = workload
        self._rank = rank
        self._counts = counts
        self._total = int(counts[:, rank].sum())
        self._capacity = capacity
        self._foreseen = foreseen
        self._known: Received | None = None
        self._baseline: _Baseline | None = None
        self._returned: dict[str, Returned] = {}
        self._unfit: dict[str, Tensor] = {}
        self.looks = Looks(self._total)

    def check_rows(  # noqa: PLR0913 - the buffers of a pass
        self,
        arm: str,
        sources: Tensor,
        counts: Counts,
        dispatched: Dispatched,
        given: ExpertInput,
        expert_out: Tensor,
    ) -> list[Divergence]:
        """Return the divergences of this pass's received rows, cut and expert rows, the earliest stage first.

        Each stage answers only for itself: expert rows whose input was already wrong are skipped. Rows that a cut
        removed are not checked here; see `check_cut`.
        """
        self._returned.pop(arm, None)
        self._unfit.pop(arm, None)
        keys, order = key_of(sources[:, 0], sources[:, 1]).sort()
        received = keys.shape[0]
        live = min(counts.live, given.rows, received)
        place = _Place(arm, self._rank, sources, order, None if live == received else order < live, self._allowed())
        rows = _for_combine(expert_out, order)
        same = _glance(place, keys, self._known, given, rows, self._reference)
        if not same.keys:
            broken = self._learn(arm, sources, keys)
            if broken is not None:
                return [broken]
            place = place._replace(allowed=self._allowed())
            same = _glance(place, keys, self._known, given, rows, self._reference)
        if self._known is None:
            return []
        reference = self._reference
        found = [
            self._check_count(arm, "capacity", dispatched.hidden.shape[0], self._capacity),
            self._check_count(arm, "total_recv", counts.total, self._total),
            self._check_left(arm, counts),
        ]
        if not same.inputs:
            wrong, unfit = self._check_inputs(place, self._known.batch, dispatched, given)
            found += wrong
            place = self._without(place, keys, unfit)
        if same.rows and reference is not None:
            self._returned[arm] = Returned(keys, reference)
        else:
            late, came_late = self._check_late(place, self._known.batch)
            found.append(late)
            place = self._without(place, keys, came_late)
            found.append(self._check_expert_rows(place, keys, rows))
        return [one for one in found if one is not None]

    @property
    def _reference(self) -> Tensor | None:
        """Expert rows [m, H] of the oracle, else of the first pass; None where neither is known."""
        expected = self._known.expert_rows if self._known else None
        return self._baseline.rows if expected is None and self._baseline else expected

    def returned(self, arm: str) -> Returned | None:
        """Return the rows that the last pass of `arm` gave to combine; None where the received rows are unknown."""
        return self._returned.get(arm)

    def unfit(self, arm: str) -> Tensor | None:
        """Return the keys int64 [u] of rows with wrong inputs in the last pass of `arm`; None where there are none."""
        return self._unfit.get(arm)

    def check_cut(self, arm: str, sources: Tensor, counts: Counts, given: ExpertInput, rows: int) -> Divergence | None:
        """Return the divergence of a cut that does not keep `rows` rows, or that loses a received row."""
        total, live, _ = counts
        cut = Divergence(stage=Stage.TRUNCATE, arm=arm, rank=self._rank, field="rows", against="received", rows=0)
        first = min(live, given.rows)
        if total > first:
            source_rank, source_token = sources[first].tolist()
            lost = [(rank, token) for rank, token in sources[first:][:LISTED_TOKENS].tolist()]
            return msgspec.structs.replace(
                cut,
                source_rank=source_rank,
                source_token=source_token,
                row=first,
                rows=total - first,
                evidence=Evidence(pattern="rows were cut away", tokens=lost),
            )
        wrong = [
            (field, pattern, against)
            for field, pattern, against, holds in (
                ("row count", "another number of rows", f"the {rows} of the limit", given.rows == rows),
                ("num_local_tokens", "rows count as live that were not received", f"total_recv {total}", live <= total),
                ("tensors", "not all tensors were cut alike", f"{given.rows} rows", _cut_alike(given)),
            )
            if not holds
        ]
        if not wrong:
            return None
        field, pattern, against = wrong[0]
        return msgspec.structs.replace(cut, field=field, against=against, rows=1, evidence=Evidence(pattern=pattern))

    def _without(self, place: _Place, keys: Tensor, unfit: Tensor | None) -> _Place:
        """Return the place without the rows `unfit` [m], of which the experts are not asked; note their keys [m]."""
        if unfit is not None:
            known = self._unfit.get(place.arm)
            here = keys[unfit]
            self._unfit[place.arm] = here if known is None else torch.cat([known, here])
        return place.without(unfit)

    def _check_inputs(
        self, place: _Place, right: TokenBatch, dispatched: Dispatched, given: ExpertInput
    ) -> tuple[list[Divergence | None], Tensor | None]:
        """Return the divergences before and after the cut, and a mask [m] of the visible rows they concern."""
        found: list[Divergence | None] = []
        after = TokenBatch(given.hidden, given.scales, given.weights, given.ids)
        before = TokenBatch(dispatched.hidden, dispatched.scales, dispatched.weights, dispatched.ids)
        wrong = place.wrong_rows(after, right)
        if wrong is None:
            return found, None
        by_cut, by_experts = self.looks.touched(given, place.order)
        received = place.wrong_rows(before, right)
        here = wrong if received is None else wrong & (~received | by_cut)
        stages = [(Stage.TRUNCATE, here & ~by_experts), (Stage.EXPERTS, wrong & by_experts)]
        if received is not None:
            found.append(self._check_received(place, right, before, received & ~by_cut & ~by_experts))
        for stage, rows in stages:
            if bool(rows.any()):
                told = place.describe(stage, after, right, rows, len(self._counts))
                found.append(_as_overwritten(told) if stage == Stage.EXPERTS else told)
        return found, wrong

    def _check_received(self, place: _Place, right: TokenBatch, before: TokenBatch, wrong: Tensor) -> Divergence | None:
        """Return the divergence of the rows `wrong` [m] as they were received, with what tells who damaged them."""
        if not bool(wrong.any()):
            return None
        found = place.describe(Stage.DISPATCH, before, right, wrong, len(self._counts))
        if found is not None:
            sources, slots = place.sources[place.order], place.slots(before)
            found.evidence.by_source, found.evidence.received = wrong_rows(
                sources, slots, wrong, before, right, self._workload.group
            )
        return found

    def _check_late(self, place: _Place, right: TokenBatch) -> tuple[Divergence | None, Tensor | None]:
        """Return the divergence of rows that came after dispatch had returned, and a mask [m] of them."""
        late = self.looks.late([part for part in right if part is not None], place.order)
        late = late if place.visible is None else late & place.visible
        if not bool(late.any()):
            return None, None
        slots = place.order[late]
        tokens = [(rank, token) for rank, token in place.sources[slots][:LISTED_TOKENS].tolist()]
        found = Divergence(
            stage=Stage.DISPATCH,
            arm=place.arm,
            rank=self._rank,
            source_rank=tokens[0][0],
            source_token=tokens[0][1],
            row=int(slots[0]),
            field="received rows",
            against="source when dispatch returned",
            rows=len(slots),
            evidence=Evidence(pattern="rows that came late", tokens=tokens),
        )
        return found, late

    def _check_left(self, arm: str, counts: Counts) -> Divergence | None:
        """Return the divergence of a live-row count that the experts have overwritten."""
        if counts.left == counts.live:
            return None
        found = Divergence(stage=Stage.EXPERTS, arm=arm, rank=self._rank, field="num_local_tokens", against="", rows=1)
        return _as_overwritten(found)

    def _check_count(self, arm: str, field: str, count: int, agreed: int) -> Divergence | None:
        """Return a divergence where a number of rows that dispatch gives differs from the agreed number."""
        if count == agreed:
            return None
        return Divergence(
            stage=Stage.DISPATCH,
            arm=arm,
            rank=self._rank,
            field=field,
            against=f"the agreed {agreed}",
            rows=abs(count - agreed),
            evidence=Evidence(pattern=f"another {field}", fields=[field]),
        )

    def _learn(self, arm: str, sources: Tensor, keys: Tensor) -> Divergence | None:
        """Take `sources` as those of this case and compute the expected rows, unless the agreed ones differ."""
        agreed = self._counts[:, self._rank]
        num_ranks = len(agreed)
        if self._foreseen is not None and torch.equal(self._foreseen.keys, keys):
            sent = torch.bincount(split_key(keys)[0], minlength=num_ranks).cpu()
            if torch.equal(sent, agreed):
                self._known = self._as_moved(self._foreseen)
                return None
        inside = self._span.holds(sources)
        doubled = int((keys[1:] == keys[:-1]).sum())
        if not inside or doubled or not torch.equal(torch.bincount(sources[:, 0], minlength=num_ranks).cpu(), agreed):
            against = f"{agreed.tolist()} rows from each rank, each token once"
            rows = max(abs(int(agreed.sum()) - len(keys)), doubled, 1)
            return self._misplaced(arm, against, rows, self._absent(sources) if inside and not doubled else {})
        batch = self._workload.token_rows(*split_key(keys))
        belongs = are_local(batch.ids, self._rank, self._workload.experts_per_rank).any(1)
        if not bool(belongs.all()):
            return self._misplaced(arm, "the routing", rows=int((~belongs).sum()))
        self._known = self._as_moved(Received(keys, batch, self._workload.expected_rows(self._rank, batch)))
        return None

    def _as_moved(self, received: Received) -> Received:
        """Return the received rows with the slots that the transport moves."""
        if not self._local_slots_only:
            return received
        batch = local_slots(received.batch, self._rank, self._workload.experts_per_rank)
        return received._replace(batch=batch)

    def _allowed(self) -> float:
        quantised = self._known is not None and self._known.batch.scales is not None
        return FP8_TOLERANCE if quantised else TOLERANCE

    def _absent(self, sources: Tensor) -> dict[int, int]:
        """Number of rows that did not arrive from each rank; empty where some rank sent more than agreed."""
        agreed = self._counts[:, self._rank]
        absent: list[int] = (agreed - torch.bincount(sources[:, 0], minlength=len(agreed)).cpu()).tolist()
        return {} if min(absent) < 0 else {rank: rows for rank, rows in enumerate(absent) if rows}

    def _misplaced(self, arm: str, against: str, rows: int, absent: dict[int, int] | None = None) -> Divergence:
        return Divergence(
            stage=Stage.DISPATCH,
            arm=arm,
            rank=self._rank,
            field="sources",
            against=against,
            rows=rows,
            evidence=Evidence(by_source=absent or {}),
        )

    def _check_expert_rows(self, place: _Place, keys: Tensor, rows: Tensor) -> Divergence | None:
        """Compare rows [m, H], ordered as `keys`, with the oracle or the first pass; keep the rows given to combine."""
        expected, against = self._known.expert_rows if self._known else None, ORACLE
        if expected is None:
            if self._baseline is None:
                return self._check_baseline(place, keys, rows)
            expected, against = self._baseline.rows, Arm.PADDED
            place = place.without(None if self._baseline.fit is None else ~self._baseline.fit)
        if rows is expected or same_bits(rows, expected):
            self._returned[place.arm] = Returned(keys, expected)
            return None
        self._returned[place.arm] = Returned(keys, rows)  # a copy, valid until the next pass of this arm
        return place.first_difference(Stage.EXPERTS, "rows", against, rows, expected)

    def _check_baseline(self, place: _Place, keys: Tensor, rows: Tensor) -> Divergence | None:
        """Take rows [m, H] as the reference of other passes, except those with a NaN, which no input holds."""
        self._returned[place.arm] = Returned(keys, rows)
        if not rows.numel() or math.isfinite(float(rows.abs().amax())):
            self._baseline = _Baseline(rows, place.visible)
            return None
        finite = rows.isfinite()
        fit = finite.all(1)
        self._baseline = _Baseline(rows, fit if place.visible is None else fit & place.visible)
        return place.first_difference(Stage.EXPERTS, "rows", FINITE, rows, rows.masked_fill(~finite, 0.0))


class _Place(NamedTuple):
    """Positions of rows: `order` [m] slots in canonical order; `visible` [m] marks those to check, None for all.

    `allowed` bounds the distance that rounding explains between an expert row and the padded arm's.
    """

    arm: str
    rank: int
    sources: Tensor
    order: Tensor
    visible: Tensor | None
    allowed: float

    def without(self, unfit: Tensor | None) -> _Place:
        """Return the place without the rows that are `unfit` [m]."""
        if unfit is None:
            return self
        return self._replace(visible=~unfit if self.visible is None else self.visible & ~unfit)

    def wrong_rows(self, actual: TokenBatch, expected: TokenBatch) -> Tensor | None:
        """Return a mask of visible rows that differ in any field, bool [m]; None where none does."""
        wrong: Tensor | None = None
        for rows, right in self.pairs(actual, expected):
            if not same_bits(rows, right):
                here = differing(rows, right).any(1)
                wrong = here if wrong is None else wrong | here
        if wrong is not None and self.visible is not None:
            wrong &= self.visible
        return wrong if wrong is not None and bool(wrong.any()) else None

    def pairs(self, actual: TokenBatch, expected: TokenBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows [m, .] of each field that both have, in canonical order, and the expected ones."""
        slots = self.slots(actual)
        for mine, right in zip(actual, expected, strict=True):
            if mine is not None and right is not None:
                yield mine.index_select(0, slots), right

    def slots(self, rows: TokenBatch) -> Tensor:
        """Return the slots [m] clamped to a buffer: a slot past its end becomes its last row."""
        return _slots_within(self.order, rows.hidden.shape[0])

    def describe(
        self, stage: str, actual: TokenBatch, expected: TokenBatch, wrong: Tensor, num_ranks: int
    ) -> Divergence | None:
        """Return the first difference of the rows `wrong` [m], at least one, with its pattern."""
        only = self._replace(visible=wrong)
        slots = self.slots(actual)
        fields = [
            found
            for name, mine, right in zip(TokenBatch._fields, actual, expected, strict=True)
            if mine is not None
            and right is not None
            and (found := only.first_difference(stage, name, "source", mine[slots], right)) is not None
        ]
        owners = self.sources[self.order][:, 0]
        evidence = msgspec.structs.replace(fields[0].evidence, fields=[found.field for found in fields])
        evidence.pattern = far_sources(owners[wrong], owners, self.rank, num_ranks) or evidence.pattern
        return msgspec.structs.replace(fields[0], evidence=evidence)

    def first_difference(
        self, stage: str, field: str, against: str, actual: Tensor, expected: Tensor
    ) -> Divergence | None:
        """Return the first difference of the visible rows [m, .], in canonical order, with its pattern."""
        slots, mine, right = self.order, actual, expected
        if self.visible is not None:
            slots, mine, right = slots[self.visible], mine[self.visible], right[self.visible]
        found = first_difference(stage, self.arm, self.rank, field, against, mine, right)
        if found is None or found.row is None:
            return found
        slot = int(slots[found.row])
        source_rank, source_token = self.sources[slot].tolist()
        rows = differing(mine, right).any(1)
        far = far_rows(mine[rows], right[rows], self.allowed) if against == Arm.PADDED else 0
        tokens = [(rank, token) for rank, token in self.sources[slots[rows]][:LISTED_TOKENS].tolist()]
        pattern = pattern_of(mine[rows], right[rows], lambda: row_digests(expected))
        evidence = Evidence(pattern=pattern, tokens=tokens, fields=[field])
        return msgspec.structs.replace(
            found, row=slot, source_rank=source_rank, source_token=source_token, far=far, evidence=evidence
        )


class _Same(NamedTuple):
    """Whether the keys are the known ones, all inputs given to the experts right, and all expert rows the reference's.

    Inputs and rows that are not have to be looked at again: only some may be visible, or nothing known of them.
    """

    keys: bool
    inputs: bool = False
    rows: bool = False


def _glance(  # noqa: PLR0913 - what is known, and the buffers
    place: _Place, keys: Tensor, known: Received | None, given: ExpertInput, rows: Tensor, reference: Tensor | None
) -> _Same:
    """Compare all at once; the host waits for a device once. Expert rows [m, H] are in the order of keys [m]."""
    if known is None or known.keys.shape != keys.shape:
        return _Same(keys=False)
    if place.visible is not None:
        return _Same(torch.equal(keys, known.keys))
    batch = TokenBatch(given.hidden, given.scales, given.weights, given.ids)
    pairs = [(keys, known.keys), *place.pairs(batch, known.batch)]
    same = same_bits_each(pairs if reference is None else [*pairs, (rows, reference)])
    return _Same(same[0], all(same[1 : len(pairs)]), reference is not None and same[-1])


def _as_overwritten(found: Divergence | None) -> Divergence | None:
    """Return the divergence of an argument of the experts as one that they have made themselves."""
    if found is None:
        return None
    evidence = msgspec.structs.replace(found.evidence, pattern=f"{found.field} {OVERWRITTEN}", fields=[found.field])
    return msgspec.structs.replace(found, against="what the experts were given", evidence=evidence)


def _cut_alike(given: ExpertInput) -> bool:
    return all(part.shape[0] == given.rows for part in given.fields())


def _slots_within(order: Tensor, count: int) -> Tensor:
    """Return the slots `order`, a permutation [m], clamped to the first `count`."""
    return order if order.shape[0] <= count else order.clamp(max=count - 1)


def _for_combine(expert_out: Tensor, order: Tensor) -> Tensor:
    """Return the rows that combine reads, in canonical order [m, H]; slots past the end of `expert_out` give poison."""
    count = expert_out.shape[0]
    if not count:
        return expert_out.new_full((order.shape[0], expert_out.shape[1]), float("nan"))
    rows = expert_out.index_select(0, _slots_within(order, count))
    if order.shape[0] > count:
        rows.masked_fill_((order >= count).unsqueeze(1), float("nan"))
    return rows


_FIELD_FACTOR = 31
_EXACT_IN_JSON = (1 << 53) - 1


def wrong_rows(  # noqa: PLR0913 - the rows and the two sides
    sources: Tensor, slots: Tensor, wrong: Tensor, actual: TokenBatch, expected: TokenBatch, group: ExpertGroup
) -> tuple[dict[int, int], list[WrongRow]]:
    """Return the number of the rows `wrong` [m] from each source rank, and the first of them.

    `sources` [m, 2] and `expected` are in canonical order; `slots` [m] are the positions of their rows in `actual`.
    """
    places = wrong.nonzero().flatten()
    ranks, counts = sources[places, 0].unique(return_counts=True)
    by_source = dict(zip(ranks.tolist(), counts.tolist(), strict=True))
    listed = places[:LISTED_TOKENS]
    bits = listed.new_zeros(len(listed))
    for mine, right in zip(actual, expected, strict=True):
        if mine is not None and right is not None:
            bits = bits * _FIELD_FACTOR + row_digests(mine[slots[listed]])[:, 0]
    going = destinations(expected.ids[listed], group.experts_per_rank, group.ep_size)
    return by_source, [
        WrongRow((rank, token), digest, to.nonzero().flatten().tolist())
        for (rank, token), digest, to in zip(
            sources[listed].tolist(), (bits & _EXACT_IN_JSON).tolist(), going, strict=True
        )
    ]
