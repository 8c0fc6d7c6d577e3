"""The first fault: stage, place and rank, with the evidence."""

from __future__ import annotations

from collections.abc import Sequence

from distbench.case.stages import ARMS, LAYER_STAGES, SUB_BATCHES, Arm, Stage
from distbench.utils.text import counted
from distbench.verify.dispatch_blame import Root, dispatch_roots
from distbench.verify.excuses import Part, any_outside, is_noise
from distbench.verify.records import (
    ANOTHER_ROW,
    LISTED_TOKENS,
    MULTIPLIED,
    POISON,
    SCATTERED,
    SEVERAL,
    Diagnosis,
    Divergence,
    Evidence,
    Gathered,
    Judgement,
    ResolvedCase,
    Token,
)
from distbench.verify.rules import error_text
from distbench.verify.verdict import part_of, parts_of

_FEW = 8
# Stages whose damage always originates in the stage itself.
_OWN_STAGES = (Stage.TRUNCATE, Stage.EXPERTS)
# Patterns that one rank's bad row makes in a sum; a flipped bit of a sum does not come from a rank's row.
_WHOLE_ROWS = (POISON, SCATTERED)
# Patterns that no single rank's row makes in a sum of several.
_OF_THE_SUM = (ANOTHER_ROW, MULTIPLIED)
_ENOUGH = 2
# Fields that travel with a row's payload.
_ROUTING = frozenset(("scales", "weights", "ids"))


def diagnose(resolved: ResolvedCase, gathered: Gathered, judgement: Judgement) -> list[Diagnosis]:
    """Return the causes that fit, the most certain first; empty where nothing differs.

    They are those of the inputs that decided the verdict.
    """
    part = part_of(parts_of(resolved, gathered), judgement.findings)
    resolved, gathered = part
    roots = _roots(part)
    causes = _causes(gathered, roots)
    if causes and (beside := _outside_ideal(part, causes)) is not None:
        causes.append(beside)
    found = [
        _lost_by_the_cut(resolved, gathered),
        _several(causes),
        *causes,
        _poison_read(gathered),
        None if causes else _first_wrong_stage(gathered, judgement) or _outside_ideal(part),
    ]
    return [diagnosis for diagnosis in found if diagnosis is not None]


def lost_tokens(gathered: Gathered) -> list[Token]:
    """Return the listed tokens that have a row at or past the limit on some rank, sorted."""
    return sorted({(rank, token) for record in gathered.observations for rank, token in record.lost.tokens})


def _roots(part: Part) -> list[Root]:
    """Return the damage that no earlier damage explains, over all arms; each stage and rank occurs once.

    Different bits from a kernel that does not repeat its bits, or from another kernel, count only where there is no
    damage and no error outside its ideal; they do not replace proven damage at the same place.
    """
    resolved, gathered = part
    roots: dict[tuple[str, bool, tuple[int, ...]], Root] = {}
    for arm in Arm:
        wrong = [found for record in gathered.observations for found in record.divergences if found.arm == arm]
        own = [_root_of(found) for found in wrong if found.stage in _OWN_STAGES and not resolved.asks_for(found)]
        own.sort(key=lambda root: not root.found.proven)
        combine = _combine_roots([found for found in wrong if found.stage == Stage.COMBINE])
        for root in [*dispatch_roots(gathered, arm, resolved.case.repeats), *own, *combine]:
            key = (root.found.stage, root.sent, tuple(root.ranks or root.candidates))
            if key not in roots or _weight(part, root) > _weight(part, roots[key]):
                roots[key] = root
    noise = [] if any_outside(part) else list(roots.values())
    found = [root for root in roots.values() if not is_noise(part, root.found)] or noise
    return sorted(found, key=lambda root: LAYER_STAGES.index(root.found.stage))


def _weight(part: Part, root: Root) -> tuple[bool, bool]:
    """Order of roots at one place: the certain one counts, and before another arm's noise the one that is none."""
    return root.certain, not is_noise(part, root.found)


def _root_of(found: Divergence) -> Root:
    return Root(found, [found.rank], found.proven)


def _combine_roots(wrong: Sequence[Divergence]) -> list[Root]:
    """Return the damage by combine in one arm: each explanation, and each pattern of unexplained tokens."""
    groups: dict[tuple[str, tuple[int, ...]], list[Divergence]] = {}
    for found in wrong:
        if found.evidence.examined:
            groups.setdefault((found.evidence.pattern, tuple(found.evidence.suspects)), []).append(found)
    return [
        root
        for (pattern, suspects), group in groups.items()
        for root in (_explained(group, list(suspects)) if suspects else _unexplained(pattern, group))
    ]


def _explained(group: list[Divergence], suspects: list[int]) -> list[Root]:
    if len(suspects) > 1:
        return [Root(group[0], [], certain=False, candidates=suspects)]
    return [Root(group[0], suspects, certain=sum(found.evidence.examined for found in group) >= _ENOUGH)]


def _unexplained(pattern: str, group: list[Divergence]) -> list[Root]:
    """Return the ranks to blame for tokens of one pattern: the tokens' owners, or the rank that sent them all."""
    if pattern not in _WHOLE_ROWS:
        proof = pattern.startswith(_OF_THE_SUM)
        return [Root(found, [found.rank], certain=proof and _of_several(found.evidence)) for found in group]
    senders = _common_destinations(group)
    if len(group) > 1:
        only = senders if len(senders) == 1 else []
        return [Root(group[0], only, certain=False, candidates=[] if only else senders)]
    others = [rank for rank in senders if rank != group[0].rank]
    if pattern == POISON and others:
        return [Root(group[0], [], certain=False, candidates=sorted({group[0].rank, *others}))]
    return [Root(group[0], [group[0].rank], certain=False)]


def _of_several(evidence: Evidence) -> bool:
    """Whether several ranks contributed to these tokens."""
    return len(evidence.by_destination) > 1


def _common_destinations(group: list[Divergence]) -> list[int]:
    """Return the ranks that had a row of every damaged token examined."""
    examined = sum(found.evidence.examined for found in group)
    ranks = {rank for found in group for rank in found.evidence.by_destination}
    return sorted(
        int(rank) for rank in ranks if sum(found.evidence.by_destination.get(rank, 0) for found in group) == examined
    )


def _causes(gathered: Gathered, roots: list[Root]) -> list[Diagnosis]:
    """Return one cause for each stage and kind of damage, with all ranks where it originated."""
    causes: dict[tuple[str, bool, str], list[Root]] = {}
    for root in roots:
        causes.setdefault((root.found.stage, root.sent, root.found.evidence.pattern), []).append(root)
    return [_cause(gathered, pattern, group) for (*_, pattern), group in causes.items()]


def _cause(gathered: Gathered, pattern: str, group: list[Root]) -> Diagnosis:
    first = group[0].found
    what = pattern or "wrong rows"
    if first.stage == Stage.DISPATCH and _ROUTING.issuperset((*first.evidence.fields, first.field)):
        what += f", in {' and '.join(first.evidence.fields)} only: the payload is right"
    if group[0].sent:
        what += ", as sent"
    what += _sub_batches(gathered, first)
    tokens = sorted({token for root in group for token in root.found.evidence.tokens})
    return Diagnosis(
        cause=f"{first.stage}: {what}",
        confidence="certain" if all(root.certain for root in group) else "likely",
        evidence=f"{_line(gathered, first)}{_kernels(gathered, first)}{next(filter(None, map(_doubt, group)), '')}",
        stage=first.stage,
        ranks=sorted({rank for root in group for rank in root.ranks}),
        tokens=tokens[:LISTED_TOKENS],
    )


def _sub_batches(gathered: Gathered, found: Divergence) -> str:
    """Name the sub-batches of two-batch overlap in which this stage is wrong; empty without it."""
    wrong = [
        one.sub_batch for record in gathered.observations for one in record.divergences if one.stage == found.stage
    ]
    names = sorted({name for one in wrong for name in SUB_BATCHES if name in one})
    return f", in sub-batch {' and '.join(names)}" if names else ""


def _line(gathered: Gathered, found: Divergence) -> str:
    """The line of a divergence, and whether only production, the caller's code, diverges."""
    line = found.line(gathered.arm_name(found.arm))
    own = any(one.arm != Arm.PRODUCTION for record in gathered.observations for one in record.divergences)
    return line if own or found.arm != Arm.PRODUCTION else f"{line}; no other arm diverges"


def _doubt(root: Root) -> str:
    """Return the caveat to the evidence, such as that no rank can be blamed."""
    names = ", ".join(map(str, root.candidates[:_FEW]))
    if root.candidates:
        return f"; the rank is unknown: each of {names} would explain it"
    return root.note if root.ranks else "; the rank is unknown: none alone explains it"


def _kernels(gathered: Gathered, found: Divergence) -> str:
    """Name the kernel where the experts are wrong only in arms of one row count."""
    if found.stage != Stage.EXPERTS:
        return ""
    kernels = next(record for record in gathered.observations if record.rank == found.rank).kernels
    guilty = kernels[found.arm]
    wrong = {
        one.arm
        for record in gathered.observations
        for one in record.divergences
        if one.stage == Stage.EXPERTS and record.rank == found.rank
    }
    right = [kernel["rows"] for arm, kernel in kernels.items() if arm not in wrong]
    text = f"; kernel {guilty['label']}, selected by M = {guilty['rows']}"
    if right and guilty["rows"] not in right:
        text += f"; right with M = {right[0]}"
    return text


def _several(causes: list[Diagnosis]) -> Diagnosis | None:
    if len(causes) < 2:  # noqa: PLR2004 - two or more are several
        return None
    names = "; ".join(f"{one.cause} (rank {', '.join(map(str, one.ranks[:_FEW]))})" for one in causes)
    return Diagnosis(
        cause=SEVERAL,
        confidence="likely",
        evidence=f"none explains the others: {names}",
        ranks=sorted({rank for one in causes for rank in one.ranks}),
    )


def _lost_by_the_cut(resolved: ResolvedCase, gathered: Gathered) -> Diagnosis | None:
    pair = "padded/truncated"
    if pair not in gathered.comparisons or not resolved.short_ranks or resolved.case.policy == "guard":
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
        evidence=f"{counted(rows, 'row')} at or past the limit of {resolved.limit}; "
        + ("the damaged tokens are exactly theirs" if exactly else f"{len(lost)} of their tokens are listed"),
        stage=Stage.TRUNCATE,
        ranks=resolved.short_ranks,
        tokens=lost[:LISTED_TOKENS],
    )


def _poison_read(gathered: Gathered) -> Diagnosis | None:
    arms = {arm: sum(record.nan_tokens[arm] for record in gathered.observations) for arm in _arms(gathered)}
    poisoned = {arm: count for arm, count in arms.items() if count}
    if not poisoned:
        return None
    counts = ", ".join(f"{counted(count, 'token')} of {gathered.arm_name(arm)}" for arm, count in poisoned.items())
    return Diagnosis(
        cause="poison read from undefined rows", confidence="certain", evidence=f"NaN in {counts}; no input holds one"
    )


def _first_wrong_stage(gathered: Gathered, judgement: Judgement) -> Diagnosis | None:
    first = judgement.first_divergence
    if first is None:
        return None
    return Diagnosis(
        cause=f"{first.stage} is the first stage that is wrong",
        confidence="certain" if first.proven and first.stage != Stage.COMBINE else "likely",
        evidence=first.line(gathered.arm_name(first.arm)),
        stage=first.stage,
        ranks=[first.rank],
    )


def _outside_ideal(part: Part, causes: Sequence[Diagnosis] = ()) -> Diagnosis | None:
    """Return the ranks whose error is outside its bounds, where all arms have the same wrong bits.

    Tokens are sums of expert rows: whose row makes them wrong is known only where the rows themselves are. Beside other
    `causes` only expert rows count, of ranks whose experts none of them names.
    """
    named = {rank for one in causes if one.stage == Stage.EXPERTS for rank in one.ranks}
    wrong = [
        (record.rank, error)
        for record in part.records
        for error in record.errors
        if not error.within and not (causes and (error.stage != Stage.EXPERTS or record.rank in named))
    ]
    if not wrong:
        return None
    arm, stage = min(((error.arm, error.stage) for _, error in wrong), key=_origin)
    there = [(rank, error) for rank, error in wrong if (error.arm, error.stage) == (arm, stage)]
    ranks = sorted(rank for rank, _ in there) if stage == Stage.EXPERTS else []
    doubt = "" if ranks else "; which rank is not known: the expert rows that were measured are within theirs"
    return Diagnosis(
        cause=f"{stage}: errors outside their bounds",
        confidence="likely",
        evidence=f"rank {there[0][0]}: {error_text(there[0][1], part.gathered.arm_name(arm))}{doubt}",
        stage=stage,
        ranks=ranks,
    )


def _origin(place: tuple[str, str]) -> tuple[int, int]:
    arm, stage = place
    return ARMS.index(arm), LAYER_STAGES.index(stage)


def _arms(gathered: Gathered) -> list[str]:
    return list(gathered.observations[0].digests)
