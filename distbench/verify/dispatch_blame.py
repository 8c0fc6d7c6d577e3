"""Attribution of rows that were received wrong: to their receiver or to their sender.

A token goes to several ranks. A token sent wrong has the same wrong bits on all of them. If one rank has it right, it
was damaged on the way to another rank, or there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import msgspec

from distbench.case.stages import Stage
from distbench.verify.records import Divergence, Gathered, Token, WrongRow


class Root(msgspec.Struct, frozen=True):
    """A divergence that no earlier one explains, the ranks to blame, and the certainty.

    No rank is blamed where any of `candidates` may be the culprit. `sent` says that the rank sent the wrong rows;
    `note` has further facts.
    """

    found: Divergence
    ranks: list[int]
    certain: bool
    candidates: list[int] = []
    sent: bool = False
    note: str = ""


def dispatch_roots(gathered: Gathered, arm: str, repeats: int) -> list[Root]:
    """Return the roots of dispatch's damage in one arm."""
    found = [
        one
        for record in gathered.observations
        for one in record.divergences
        if (one.arm, one.stage) == (arm, Stage.DISPATCH)
    ]
    others = list(_of_other_fields([one for one in found if not one.evidence.received]))
    rows = [one for one in found if one.evidence.received]
    for sub_batch in sorted({one.sub_batch for one in rows}):
        others += _Rows(gathered, arm, repeats, [one for one in rows if one.sub_batch == sub_batch]).roots()
    return others


def _of_other_fields(found: list[Divergence]) -> Iterator[Root]:
    """Yield roots of wrong counts and sources: the ranks that have them, or a sender whose rows no other rank got."""
    absent = [one for one in found if one.evidence.by_source]
    senders = {rank for one in absent for rank in one.evidence.by_source}
    ranks = [one.rank for one in absent]
    if len(ranks) > 1 and len(senders) == 1 and not senders & set(ranks):
        (sender,) = senders
        note = f"; on ranks {', '.join(map(str, ranks))} only rows of rank {sender} did not arrive"
        yield Root(absent[0], [sender], certain=False, sent=True, note=note)
        found = [one for one in found if one not in absent]
    yield from (Root(one, [one.rank], certain=True) for one in found)


class _Rows:
    """Rows that were received wrong in one arm, on all ranks."""

    def __init__(self, gathered: Gathered, arm: str, repeats: int, wrong: list[Divergence]) -> None:
        self._wrong = {found.rank: found for found in wrong}
        self._listed = {found.rank: {row.token: row for row in found.evidence.received} for found in wrong}
        self._complete = {rank for rank, found in self._wrong.items() if _count(found) == len(self._listed[rank])}
        self._saw_all = self._witnesses(gathered, arm) if repeats == 1 else set()
        received = sum(record.total_recv for record in gathered.observations)
        self._some_are_right = sum(map(_count, wrong)) < received

    def roots(self) -> list[Root]:
        """Return the roots, senders first."""
        spoilt_here = {rank for rank, rows in self._listed.items() if any(map(self._is_right_elsewhere, rows.values()))}
        senders = self._senders(spoilt_here) if self._some_are_right else {}
        left = {rank: sorted(found.evidence.by_source.keys() - senders.keys()) for rank, found in self._wrong.items()}
        here = [rank for rank in self._wrong if rank in spoilt_here or len(left[rank]) > 1]
        return [
            *senders.values(),
            *(Root(self._wrong[rank], [rank], certain=True) for rank in here),
            *self._of_one_source({rank: sources[0] for rank, sources in left.items() if sources and rank not in here}),
        ]

    def _witnesses(self, gathered: Gathered, arm: str) -> set[int]:
        """Return the ranks that checked every row they received."""
        blind = {
            record.rank
            for record in gathered.observations
            for one in record.divergences
            if one.arm == arm and one.stage in (Stage.DISPATCH, Stage.TRUNCATE) and not one.evidence.received
        }
        return {record.rank for record in gathered.observations} - blind

    def _has_right(self, rank: int, token: Token) -> bool:
        """Whether a rank that received a token is known to have it right."""
        listed = self._listed.get(rank, {})
        seen = rank not in self._wrong or rank in self._complete or token < max(listed)
        return rank in self._saw_all and token not in listed and seen

    def _is_right_elsewhere(self, row: WrongRow) -> bool:
        """Whether another rank has the token right; its sender alone proves nothing against several other ranks."""
        right = [rank for rank in row.receivers if self._has_right(rank, row.token)]
        return bool(right) and (right != [row.token[0]] or len(self._with_same_bits(row)) == 1)

    def _with_same_bits(self, row: WrongRow) -> list[int]:
        same = (self._listed.get(rank, {}).get(row.token) for rank in row.receivers)
        return [rank for rank, other in zip(row.receivers, same, strict=True) if other and other.bits == row.bits]

    def _senders(self, spoilt_here: set[int]) -> dict[int, Root]:
        """Return the sources of tokens that several ranks have wrong in the same bits, and none right.

        At least one of these ranks has no damage of its own: two ranks that damage received rows may damage a token
        alike.
        """
        senders: dict[int, Root] = {}
        for rank, rows in self._listed.items():
            for row in rows.values() if rank not in spoilt_here else ():
                source, token = row.token
                ranks = self._with_same_bits(row)
                if len(ranks) > 1 and source not in senders:
                    text = ", ".join(map(str, ranks))
                    note = f"; token {token} of rank {source} has the same wrong bits on ranks {text}: sent with them"
                    senders[source] = Root(self._wrong[rank], [source], certain=True, sent=True, note=note)
        return senders

    def _of_one_source(self, sources: dict[int, int]) -> Iterator[Root]:
        """Yield roots for ranks whose wrong rows come from one source only, with no other rank to compare with."""
        by_source: dict[int, list[int]] = defaultdict(list)
        for rank, source in sources.items():
            by_source[source].append(rank)
        for source, ranks in by_source.items():
            found = self._wrong[ranks[0]]
            if ranks == [source]:
                yield Root(found, ranks, certain=True)
            elif len(ranks) == 1:
                yield Root(found, ranks, certain=False, note=f"; or rank {source} sent it wrong")
            else:
                note = f"; all wrong rows on ranks {', '.join(map(str, ranks))} come from rank {source}"
                yield Root(found, [source], certain=False, sent=True, note=note)


def _count(found: Divergence) -> int:
    return sum(found.evidence.by_source.values())
