"""What the differing tokens have in common, said with its evidence."""

from __future__ import annotations

from distbench.verify.records import LISTED_TOKENS, Diagnosis, Gathered, Judgement, Question, Token


def diagnose(question: Question, gathered: Gathered, judgement: Judgement) -> list[Diagnosis]:
    """Return the causes that fit, the surest first; empty where nothing differs."""
    found = [
        _lost_by_the_cut(question, gathered),
        _poison_read(gathered),
        _first_wrong_stage(judgement),
    ]
    return [diagnosis for diagnosis in found if diagnosis is not None]


def lost_tokens(gathered: Gathered) -> list[Token]:
    """Return the listed tokens that have a row at or past the limit on some rank, sorted."""
    return sorted({(rank, token) for record in gathered.observations for rank, token in record.lost.tokens})


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
        ranks=[first.rank],
    )


def _arms(gathered: Gathered) -> list[str]:
    return list(gathered.observations[0].digests)
