"""What went wrong first, where, and on which rank, said with its evidence."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from distbench.breadcrumbs import ARMS
from distbench.verify.records import (
    LISTED_TOKENS,
    POISON,
    SCATTERED,
    STAGE_ORDER,
    Diagnosis,
    Divergence,
    Gathered,
    Judgement,
    Question,
    Token,
)

_FEW = 8
_UNKNOWN = "; which rank is not known, since several have a row of every damaged token"
# What a bad row of one rank makes of a sum; a flipped bit of a sum does not come from a rank's row.
_WHOLE_ROWS = (POISON, SCATTERED)


class Root(msgspec.Struct, frozen=True):
    """A divergence that no earlier one explains, the ranks to blame, and how sure that is."""

    found: Divergence
    ranks: list[int]
    certain: bool


def diagnose(question: Question, gathered: Gathered, judgement: Judgement) -> list[Diagnosis]:
    """Return the causes that fit, the surest first; empty where nothing differs."""
    roots = _roots(question, gathered)
    causes = _causes(gathered, roots)
    found = [
        _lost_by_the_cut(question, gathered),
        _several(causes),
        *causes,
        _poison_read(gathered),
        None if causes else _first_wrong_stage(judgement),
    ]
    return [diagnosis for diagnosis in found if diagnosis is not None]


def lost_tokens(gathered: Gathered) -> list[Token]:
    """Return the listed tokens that have a row at or past the limit on some rank, sorted."""
    return sorted({(rank, token) for record in gathered.observations for rank, token in record.lost.tokens})


def _roots(question: Question, gathered: Gathered) -> list[Root]:
    """Return what no earlier damage explains, over all arms; the same stage on the same rank comes once."""
    roots: dict[tuple[str, tuple[int, ...]], Root] = {}
    for arm in ARMS[1:]:
        wrong = [found for record in gathered.observations for found in record.divergences if found.arm == arm]
        upstream = [found for found in wrong if found.stage != "combine"]
        own = [_root_of(found) for found in upstream if not _asked_for(question, found)]
        for root in [*own, *_combine_roots(wrong, upstream)]:
            roots.setdefault((root.found.stage, tuple(root.ranks)), root)
    return sorted(roots.values(), key=lambda root: STAGE_ORDER.index(root.found.stage))


def _asked_for(question: Question, found: Divergence) -> bool:
    """Whether the case itself asks for this loss: a limit below what the rank receives."""
    return found.stage == "truncate" and found.field == "rows" and found.rank in question.short_ranks


def _root_of(found: Divergence) -> Root:
    return Root(found, [found.rank], found.against != "padded")


def _combine_roots(wrong: Iterable[Divergence], upstream: list[Divergence]) -> list[Root]:
    """Return the damage that combine did itself: tokens of which no row was wrong before."""
    before = {token for found in upstream for token in found.clues.tokens}
    if any(found.rows > len(found.clues.tokens) for found in upstream):
        return []  # not all rows that were wrong before are listed, so nothing says that combine added to them
    left = [found for found in wrong if found.stage == "combine" and not before.issuperset(found.clues.tokens)]
    if not left:
        return []
    # Where whole shares explain the tokens, the ranks that sent them are to blame, else those that hold the tokens.
    suspects = {rank for found in left for rank in found.clues.suspects}
    if suspects and all(found.clues.suspects for found in left):
        return [Root(left[0], sorted(suspects), certain=True)]
    common = _common_destinations(left) if len(left) > 1 and not before else []
    if common:
        return [Root(left[0], common if len(common) == 1 else [], certain=False)]
    return [Root(found, found.clues.suspects or [found.rank], certain=True) for found in left]


def _common_destinations(left: list[Divergence]) -> list[int]:
    """Return the ranks that had a row of every damaged token that was looked at, where whole rows are damaged."""
    if any(found.clues.pattern not in _WHOLE_ROWS for found in left):
        return []
    examined = sum(found.clues.examined for found in left)
    ranks = {rank for found in left for rank in found.clues.by_destination}
    return sorted(
        int(rank) for rank in ranks if sum(found.clues.by_destination.get(rank, 0) for found in left) == examined
    )


def _causes(gathered: Gathered, roots: list[Root]) -> list[Diagnosis]:
    """Return one cause for each stage and sort of damage, with all ranks that it began on."""
    causes: dict[tuple[str, str], list[Root]] = {}
    for root in roots:
        causes.setdefault((root.found.stage, root.found.clues.pattern), []).append(root)
    return [_cause(gathered, pattern, group) for (_, pattern), group in causes.items()]


def _cause(gathered: Gathered, pattern: str, group: list[Root]) -> Diagnosis:
    first = group[0].found
    what = pattern or "wrong rows"
    if first.stage == "dispatch" and not {"hidden", "total_recv", "sources"} & {*first.clues.fields, first.field}:
        what += f", in {' and '.join(first.clues.fields)} only: the payload is right"
    tokens = sorted({token for root in group for token in root.found.clues.tokens})
    return Diagnosis(
        cause=f"{first.stage}: {what}",
        confidence="certain" if all(root.certain for root in group) else "likely",
        evidence=f"{first}{_kernels(gathered, first)}{'' if group[0].ranks else _UNKNOWN}",
        stage=first.stage,
        ranks=sorted({rank for root in group for rank in root.ranks}),
        tokens=tokens[:LISTED_TOKENS],
    )


def _kernels(gathered: Gathered, found: Divergence) -> str:
    """Name the kernel where the experts are wrong in the arms of one row count only."""
    if found.stage != "experts":
        return ""
    kernels = next(record for record in gathered.observations if record.rank == found.rank).kernels
    guilty = kernels[found.arm]
    wrong = {
        one.arm
        for record in gathered.observations
        for one in record.divergences
        if one.stage == "experts" and record.rank == found.rank
    }
    right = [kernel["rows"] for arm, kernel in kernels.items() if arm not in wrong]
    text = f"; kernel {guilty['label']}, selected by M = {guilty['rows']}"
    if right and guilty["rows"] not in right:
        text += f"; right with M = {right[0]}"
    return text


def _several(causes: list[Diagnosis]) -> Diagnosis | None:
    if len(causes) < 2:  # noqa: PLR2004 - two are several
        return None
    names = "; ".join(f"{one.cause} (rank {', '.join(map(str, one.ranks[:_FEW]))})" for one in causes)
    return Diagnosis(
        cause="several faults at once",
        confidence="likely",
        evidence=f"none explains the others: {names}",
        ranks=sorted({rank for one in causes for rank in one.ranks}),
    )


def _lost_by_the_cut(question: Question, gathered: Gathered) -> Diagnosis | None:
    pair = "padded/truncated"
    if pair not in gathered.comparisons or not question.short_ranks or question.case.policy == "guard":
        return None
    lost, damaged = lost_tokens(gathered), gathered.differing[pair]
    rows = sum(record.lost.rows for record in gathered.observations)
    complete = len(damaged) < LISTED_TOKENS and all(
        record.lost.rows <= LISTED_TOKENS for record in gathered.observations
    )
    exactly = complete and sorted(damaged) == lost
    return Diagnosis(
        cause="lost by the cut",
        confidence="certain" if exactly else "likely",
        evidence=f"{rows} rows lie at or past the limit of {question.limit}; "
        + ("the damaged tokens are exactly theirs" if exactly else f"{len(lost)} of their tokens are listed"),
        stage="truncate",
        ranks=question.short_ranks,
        tokens=lost[:LISTED_TOKENS],
    )


def _poison_read(gathered: Gathered) -> Diagnosis | None:
    arms = {arm: sum(record.nan_tokens[arm] for record in gathered.observations) for arm in _arms(gathered)}
    poisoned = {arm: count for arm, count in arms.items() if count}
    if not poisoned:
        return None
    counts = ", ".join(f"{count} tokens of {arm}" for arm, count in poisoned.items())
    return Diagnosis(
        cause="poison read from undefined rows", confidence="certain", evidence=f"NaN in {counts}; no input holds one"
    )


def _first_wrong_stage(judgement: Judgement) -> Diagnosis | None:
    first = judgement.first_divergence
    if first is None:
        return None
    return Diagnosis(
        cause=f"{first.stage} is the first stage that is wrong",
        confidence="likely" if first.against == "padded" else "certain",
        evidence=str(first),
        stage=first.stage,
        ranks=[first.rank],
    )


def _arms(gathered: Gathered) -> list[str]:
    return list(gathered.observations[0].digests)
