"""The check of combine: every token against the sum of the returned rows, and attribution of wrong tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case.stages import Stage
from distbench.distributed.exchange import Exchange
from distbench.distributed.session import Session
from distbench.distributed.waits import collective
from distbench.verify.combine_blame import ALONE, Alternatives, Same, changed, choose, effects, explained_by
from distbench.verify.combine_model import (
    Contributions,
    OwnSlots,
    Returned,
    added,
    recounted,
    same_bits_or_nan,
    tokens_of_a_round,
)
from distbench.verify.damage_patterns import pattern_of
from distbench.verify.records import LISTED_TOKENS, MULTIPLIED, ORACLE, RETURNED, Divergence, Evidence
from distbench.verify.row_compare import difference, first_difference, row_digests, same_bits
from distbench.workload.inputs import Workload

_EXAMINED = 32
_SPARED = 16


class _Sample(NamedTuple):
    """Some tokens [s] of this rank: the rows returned for them, combine's output, and the expected output."""

    tokens: Tensor
    contributions: Contributions
    actual: Tensor
    expected: Tensor

    def take(self, index: Tensor | slice) -> _Sample:
        return _Sample(self.tokens[index], self.contributions.take(index), self.actual[index], self.expected[index])


class _Some:
    """The first tokens of one kind, collected over blocks; `seen` counts them all."""

    def __init__(self, most: int) -> None:
        self.seen = 0
        self._most = most
        self._parts: list[_Sample] = []

    def take(self, block: _Sample, which: Tensor) -> None:
        index = which.nonzero().flatten()
        self._parts.append(block.take(index[: self._room]))
        self.seen += index.numel()

    def take_all(self, block: _Sample) -> None:
        self._add(block, self._room)
        self.seen += len(block.tokens)

    def take_none(self, block: _Sample) -> None:
        self._add(block, 0)

    def _add(self, block: _Sample, count: int) -> None:
        if count or not self._parts:  # a view keeps all of its block in memory
            self._parts.append(block.take(slice(0, count)))

    @property
    def _room(self) -> int:
        return max(self._most - self.seen, 0)

    def joined(self) -> _Sample:
        if len(self._parts) == 1:
            return self._parts[0]
        tokens, contributions, actual, expected = zip(*self._parts, strict=True)
        rows, ranks = zip(*contributions, strict=True)
        return _Sample(
            torch.cat(tokens), Contributions(torch.cat(rows), torch.cat(ranks)), torch.cat(actual), torch.cat(expected)
        )


class _Recount(NamedTuple):
    """All tokens of this rank: the number of wrong ones, the first wrong and first right ones, and block sums."""

    wrong: int
    examined: _Sample
    spared: _Sample
    sums: list[Tensor]

    def sum_digests(self) -> Tensor:
        return row_digests(torch.cat(self.sums))


class Combined(NamedTuple):
    """One pass on this rank: combine's output tokens [n, H], and the rows that this rank returned for others' sums.

    `returned` is None where the received rows are unknown; `damaged` says that the returned rows were already wrong.
    `lost` bool [n] marks tokens that lost a row to the limit; None where none did.
    """

    arm: str
    tokens: Tensor
    returned: Returned | None
    damaged: bool
    lost: Tensor | None = None


class Rider(Protocol):
    """More bytes of the rows that every rank returned, which travel with them to the tokens' owners.

    `keys` int64 [m] are those of the rows, `rows` bf16 [m, c] holds the bytes. `arrive` takes the rows of this rank's
    tokens, and returns a flag; `told` says whether any rank gave it. Neither is called if the rows cannot travel
    together, on all ranks or none.
    """

    keys: Tensor
    rows: Tensor

    def arrive(self, laid: Contributions) -> bool: ...  # noqa: D102 - see above

    def told(self, *, anywhere: bool) -> None: ...  # noqa: D102 - see above


class _Doubts(NamedTuple):
    """Ways in which a pass may differ from the first pass: without sums, or with other sources, rows or tokens."""

    sums: bool
    sources: bool
    rows: bool
    tokens: bool


class Own(NamedTuple):
    """This rank, its tokens' slots, and their expected outputs; None where inputs are not exact."""

    rank: int
    slots: OwnSlots
    expected: Tensor | None


class CombineChecker:
    """Checks combine's output on one rank; every rank of the group makes one, and calls it for the same arms."""

    def __init__(self, session: Session, exchange: Exchange, workload: Workload, own: Own, allowed: float) -> None:
        """Keep the parts; `allowed` bounds errors of quantised sums, as a share of the token's largest magnitude."""
        self._group, self._exchange, self._on_any_rank = session.group, exchange, session.flags_on_any_rank
        self._workload = workload
        self._rank, self._slots, self._expected = own
        self._order = own.slots.order
        self._loose = self._order.quantised and own.expected is None
        self._same: Same = _within(allowed) if self._loose else same_bits_or_nan
        self._first: Combined | None = None
        self._first_is_right = False
        self._unshared = False  # whether a rank may have found what the others do not know

    def check(
        self, passes: Sequence[Combined], *, wrong: bool, rider: Rider | None = None
    ) -> tuple[list[Divergence], bool]:
        """Return the first wrong token of each cause: tokens that are not the sum of the returned rows. Collective.

        Return also whether any rank has found one, or is `wrong` about anything else.

        A pass has no such sum where the received rows of some rank are unknown, or where quantised rows were already
        wrong: a token that then differs from the oracle is reported without a cause. If all ranks returned the rows of
        the first pass again, they must get the same tokens again. Then no rows are exchanged; where sums are known
        within rounding only, this is the sharper check. `rider` travels with rows that are exchanged, if any are.
        """
        if not any(self._workload.tokens_per_rank):
            return [], self._on_any_rank([wrong])[0]
        self._first = self._first or passes[0]
        wrong, alone, doubts = self._doubts_anywhere(passes, self._first, rider, wrong=wrong)
        found: list[Divergence] = []
        self._unshared = any(doubt.sums for doubt in doubts)
        asked = [(one, doubt) for one, doubt in zip(passes, doubts, strict=True) if self._in_doubt(one, doubt)]
        found += self._check_some(asked, None if alone else rider)
        left = [pair for pair in zip(passes, doubts, strict=True) if pair not in asked and not pair[1].sums]
        if not self._first_is_right:
            found += self._check_some(left)
        for one, doubt in zip(passes, doubts, strict=True):
            if doubt.sums:
                found += self._against(ORACLE, one, self._expected)
        return found, wrong or (self._unshared and self._on_any_rank([bool(found)])[0])

    def _in_doubt(self, one: Combined, doubts: _Doubts) -> bool:
        """Whether a pass has to be recounted even if the first pass is right."""
        first = one is self._first and not self._first_is_right
        return not doubts.sums and (first or doubts.rows or doubts.tokens)

    def _doubts_anywhere(
        self, passes: Sequence[Combined], first: Combined, rider: Rider | None, *, wrong: bool
    ) -> tuple[bool, bool, list[_Doubts]]:
        """Return whether any rank is `wrong`, or has other rows than those of the rider, and all doubts. Collective."""
        returned = first.returned
        alone = rider is None or returned is None or not torch.equal(rider.keys, returned.keys)
        doubts = (flag for one in passes for flag in self._doubts(one, first))
        wrong, alone, *flags = self._on_any_rank([wrong, alone, *doubts])
        count = len(_Doubts._fields)
        return wrong, alone, [_Doubts(*flags[start : start + count]) for start in range(0, len(flags), count)]

    def _doubts(self, one: Combined, first: Combined) -> _Doubts:
        sources = rows = True
        if one.returned is not None and first.returned is not None:
            sources = not torch.equal(one.returned.keys, first.returned.keys)
            rows = one.returned.rows is not first.returned.rows
        return _Doubts(
            sums=one.returned is None or (self._order.quantised and one.damaged),
            sources=sources,
            rows=rows,
            tokens=not same_bits(one.tokens, first.tokens),
        )

    def _check_some(self, asked: Sequence[tuple[Combined, _Doubts]], rider: Rider | None = None) -> list[Divergence]:
        """Check the passes that have sums; those with the first pass's sources share one exchange, and the rider's."""
        alike = [pair for pair in asked if not pair[1].sources]
        groups = [alike, *([pair] for pair in asked if pair[1].sources)]
        riders = [rider if alike and self._fits(rider, len(alike)) else None, *([None] * (len(groups) - 1))]
        counted: list[tuple[Combined, _Doubts, _Recount]] = []
        flags: list[bool] = []
        for group, one_rider in zip(groups, riders, strict=True):
            if group:
                recounts, given = self._recounts([one for one, _ in group], one_rider)
                counted += [(*pair, recount) for pair, recount in zip(group, recounts, strict=True)]
                flags += given
        if not counted:
            return []
        wrong = self._on_any_rank([*(recount.wrong > 0 for _, _, recount in counted), *flags])
        if flags and riders[0] is not None:
            riders[0].told(anywhere=wrong.pop())
        found: list[Divergence] = []
        for (one, doubts, recount), anywhere in zip(counted, wrong, strict=True):
            found += self._judged(one, doubts, recount, wrong=anywhere)
        return found

    def _judged(self, one: Combined, doubts: _Doubts, recount: _Recount, *, wrong: bool) -> list[Divergence]:
        if wrong:
            self._unshared = True
            tables = self._gathered_effects(recount)
            chosen = choose([explaining for explaining, _ in tables], [spared for _, spared in tables])
            return self._explain(one.arm, recount, tables[self._rank][0], chosen) if recount.wrong else []
        self._first_is_right |= one is self._first
        first = self._first
        alike = self._loose and not doubts.rows and first is not None
        self._unshared |= alike
        return self._against("padded's result for the same rows", one, first.tokens) if alike and first else []

    def _against(self, name: str, one: Combined, expected: Tensor | None) -> list[Divergence]:
        """Return the first difference from `expected` among tokens that lost no row, without a cause; None if equal."""
        if expected is None:
            return []
        kept = torch.arange(len(expected), device=expected.device)
        kept = kept if one.lost is None else kept[~one.lost.to(kept.device)]
        tokens, expected = one.tokens[kept], expected[kept]
        found = first_difference(Stage.COMBINE, one.arm, self._rank, "tokens", name, tokens, expected)
        return [] if found is None else [self._at_token(found, int(kept[found.row or 0]))]

    def _fits(self, rider: Rider | None, passes: int) -> bool:
        """Whether the rider's bytes and the rows of so many passes travel in one round."""
        if rider is None:
            return False
        first = self._first.tokens if self._first else rider.rows
        size = (passes * first.shape[1] + rider.rows.shape[1]) * rider.rows.element_size()
        return max(self._workload.tokens_per_rank) <= tokens_of_a_round(size, self._slots.ep_size, first.device)

    def _recounts(self, passes: Sequence[Combined], rider: Rider | None) -> tuple[list[_Recount], list[bool]]:
        """Add up the rows of passes that have the same sources; return the rider's flag too, if any. Collective."""
        workload = self._workload
        returned = [one.returned for one in passes if one.returned is not None]
        extra = [] if rider is None else [rider.rows]
        together = Returned(returned[0].keys, torch.cat([*(one.rows for one in returned), *extra], dim=1))
        widths = [rows.shape[1] for rows in (*(one.rows for one in returned), *extra)]
        flags: list[bool] = []
        examined, spared = [_Some(_EXAMINED) for _ in passes], [_Some(_SPARED) for _ in passes]
        sums: list[list[Tensor]] = [[] for _ in passes]
        most = max(workload.tokens_per_rank)
        for start, given in recounted(self._exchange, self._rank, together, self._slots, most):
            parts = given.rows.split(widths, dim=2)
            if rider is not None:
                flags = [rider.arrive(Contributions(parts[-1], given.ranks))]
            tokens = torch.arange(start, start + given.ranks.shape[0], device=given.ranks.device)
            for place, rows in enumerate(parts[: len(passes)]):
                part = Contributions(workload.returned_rows(rows), given.ranks)
                expected = added(part, self._order)
                actual = passes[place].tokens[start : start + tokens.shape[0]]
                block = _Sample(tokens, part, actual, expected)
                if same_bits(actual, expected):
                    examined[place].take_none(block)
                    spared[place].take_all(block)
                else:
                    right = self._same(actual, expected)
                    examined[place].take(block, ~right)
                    spared[place].take(block, right)
                sums[place].append(expected)
        return [
            _Recount(some.seen, some.joined(), right.joined(), made)
            for some, right, made in zip(examined, spared, sums, strict=True)
        ], flags

    def _gathered_effects(self, recount: _Recount) -> list[tuple[list[list[int]], list[list[int]]]]:
        """Return `effects` of each rank's wrong tokens and of its right ones, in the form for `choose`. Collective."""
        wrong, right = recount.examined, recount.spared
        explaining = self._effects(wrong, lambda sums: self._same(wrong.actual, sums))
        sparing = self._effects(right, lambda sums: ~self._same(right.expected, sums))
        table = explaining.new_full((_EXAMINED + _SPARED, 1 + explaining.shape[1]), -1)
        for start, part in ((0, explaining), (_EXAMINED, sparing)):
            table[start : start + len(part), 0] = 1
            table[start : start + len(part), 1:] = part
        everyone = [torch.empty_like(table) for _ in range(dist.get_world_size(self._group))]
        with collective("all_gather", table.get_device()):
            dist.all_gather(everyone, table, group=self._group)
        return [(_rows(one[:_EXAMINED]), _rows(one[_EXAMINED:])) for one in everyone]

    def _effects(self, sample: _Sample, holds: Callable[[Tensor], Tensor]) -> Tensor:
        return effects(sample.contributions, self._rank, self._order, self._workload.fp8, holds)

    def _explain(
        self, arm: str, recount: _Recount, table: list[list[int]], chosen: list[Alternatives]
    ) -> list[Divergence]:
        """Return a divergence for each explanation that holds for tokens of this rank, and one for the others."""
        sample = recount.examined
        modelled = self._modelled(sample, chosen)
        groups: dict[int, list[int]] = {}
        for token, place in enumerate(self._causes(sample, table, chosen)):
            groups.setdefault(place, []).append(token)
        return [
            self._divergence(
                arm, recount, torch.tensor(tokens, device=modelled.device), modelled, [*chosen, ()][place], len(groups)
            )
            for place, tokens in sorted(groups.items())
        ]

    def _modelled(self, sample: _Sample, chosen: Sequence[Alternatives]) -> Tensor:
        """Return combine's output if all of the chosen explanations held."""
        explanations = [one[0] for one in chosen]
        return added(changed(sample.contributions, explanations, self._rank, self._workload.fp8), self._order)

    def _causes(self, sample: _Sample, table: list[list[int]], chosen: list[Alternatives]) -> list[int]:
        """Return the index of each token's explanation among the chosen; their number where none fits.

        Explanations of the rows that other ranks returned come before ALONE, by which this rank added only its own
        rows. Where a token lacks the shares of all others, and each share is missing elsewhere too, the ranks that sent
        them are to blame.
        """
        others = [one for one in chosen if one[0].what != ALONE]
        together = self._same(sample.actual, self._modelled(sample, others)).tolist()
        found = []
        for token, row in enumerate(table):
            single = [place for place, one in enumerate(chosen) if explained_by(row, one)]
            joint = [chosen.index(one) for one in others if together[token] and _concerns(sample, token, one)]
            by_others = [place for place in single if chosen[place] in others]
            found.append((by_others or joint or single or [len(chosen)])[0])
        return found

    def _divergence(  # noqa: PLR0913 - the facts of a group of tokens
        self, arm: str, recount: _Recount, index: Tensor, modelled: Tensor, causes: Alternatives, num_groups: int
    ) -> Divergence:
        chosen = recount.examined.take(index)
        found = difference(Stage.COMBINE, arm, self._rank, "tokens", RETURNED, chosen.actual, chosen.expected)
        going = [rank for rank in chosen.contributions.ranks.flatten().tolist() if rank >= 0]
        pattern = causes[0].what if causes else pattern_of(chosen.actual, modelled[index], recount.sum_digests)
        if pattern == f"{MULTIPLIED} {self._workload.group.ep_size}":
            pattern = f"{MULTIPLIED} the number of ranks"
        return msgspec.structs.replace(
            self._at_token(found, int(chosen.tokens[found.row or 0])),
            rows=recount.wrong if num_groups == 1 else len(index),
            evidence=Evidence(
                pattern=pattern,
                tokens=[(self._rank, number) for number in chosen.tokens[:LISTED_TOKENS].tolist()],
                suspects=sorted({one.rank for one in causes}),
                examined=len(index),
                by_destination={str(rank): going.count(rank) for rank in sorted(set(going))},
            ),
        )

    def _at_token(self, found: Divergence, token: int) -> Divergence:
        return msgspec.structs.replace(found, row=token, source_rank=self._rank, source_token=token)


def _concerns(sample: _Sample, token: int, alternatives: Alternatives) -> bool:
    there = set(sample.contributions.ranks[token].tolist())
    return any(one.rank in there for one in alternatives)


def _rows(table: Tensor) -> list[list[int]]:
    """Return the rows that are filled in, without their flag column."""
    return [row[1:] for row in table.tolist() if row[0] > 0]


def _within(allowed: float) -> Same:
    def near(actual: Tensor, expected: Tensor) -> Tensor:
        wide, right = actual.float(), expected.float()
        close = (wide - right).abs() <= allowed * right.abs().amax(1, keepdim=True)
        return (close | (wide.isnan() & right.isnan()) | (wide == right)).all(1)

    return near
