"""A comparison as text for a person, the worst first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distbench.tools.compare.comparison import ALL_CASES, CaseFinding, Comparison, Key, TimeFinding
from distbench.tools.compare.launches import LEAST_LAUNCHES
from distbench.tools.compare.noise import ALPHA, LEAST_SAMPLES, POWER
from distbench.utils.text import counted

_SHOWN = 50
_SHOWN_VALUES = 8
_MEANINGS = {0: "nothing became worse", 1: "something became worse", 77: "not all can be judged"}
_CHANGED = ("slower", "faster", "suspect")
_WORST_FIRST = (
    "regressed",
    "new failure",
    "absent",
    "another case",
    "time absent",
    "no result",
    "still failing",
    "fixed",
)


def comparison_lines(comparison: Comparison, *, every: bool = False, alone: bool = False) -> Iterator[str]:
    """Yield the lines: the environment, undetectable changes, cases, stages, single cases, the result.

    Without `every`, at most 50 differences of the environment and 50 cases; `alone`: only cases and times that changed,
    and the result.
    """
    most = len(comparison.cases) + len(comparison.environment) if every else _SHOWN
    if not alone:
        yield from _environment(comparison, most)
        yield from limit_lines(comparison)
    cases = worst_first(comparison.cases)
    for found in cases[:most]:
        verdicts = " → ".join(filter(None, (found.old, found.new)))
        yield f"{found.kind:<14} {found.name}: {verdicts}{': ' if found.message else ''}{found.message}"
    if len(cases) > most:
        yield f"and {counted(len(cases) - most, 'case')} more (-v has all)"
    for time in sorted(comparison.times, key=lambda one: one.case != ALL_CASES):
        judgement = judgement_of(time, comparison)
        if judgement in _CHANGED or not alone:
            yield _time_line(time, judgement)
    told = [f"{counted(comparison.pairs, 'case')} compared"]
    told += [f"{len(comparison.unjudged)} arms and stages not judged"] if comparison.unjudged else []
    told += (
        [f"{counted(len(comparison.environment), 'difference')} of the environment"] if comparison.environment else []
    )
    yield f"exit {comparison.exit_code}, {_MEANINGS[comparison.exit_code]}: {', '.join(told)}"


def _environment(comparison: Comparison, most: int) -> Iterator[str]:
    for found in comparison.environment[:most]:
        old, new = (short_list(values) for values in (found.old, found.new))
        yield f"environment    {found.what}: {old} → {new}"
    if len(comparison.environment) > most:
        yield f"and {counted(len(comparison.environment) - most, 'difference')} of the environment more (-v has all)"


def short_list(values: Sequence[str]) -> str:
    """The first values, and how many more there are."""
    more = f" and {len(values) - _SHOWN_VALUES} more" if len(values) > _SHOWN_VALUES else ""
    return ", ".join(values[:_SHOWN_VALUES]) + more or "none"


def worst_first(cases: Sequence[CaseFinding]) -> list[CaseFinding]:
    """Findings by kind, the worst kind first."""
    return sorted(cases, key=lambda found: _WORST_FIRST.index(found.kind))


def limit_lines(comparison: Comparison) -> Iterator[str]:
    """Yield the changes that the comparison could not have detected, the worst first."""
    if comparison.untimed:
        yield (
            f"no times compared: no arm and stage has {LEAST_SAMPLES} samples on each side in a case that ended the "
            "same way; run both with --iterations, or give --verdicts-only"
        )
    if comparison.unjudged:
        yield (
            f"not judged: {_named(comparison.unjudged)}: too few samples ({LEAST_SAMPLES} of each), or too much noise: "
            "not even a tenfold slowdown would have been detected"
        )
    if comparison.suspect:
        names = ", ".join(f"{arm}/{stage} in {case or 'all cases'}" for arm, stage, case in comparison.suspect[:_SHOWN])
        yield f"suspect: far slower, but too few samples or too much noise to call it so: {names}; run both again"
    if comparison.coarse:
        yield (
            f"too much noise to find as little as --detect {comparison.detect:g}: {_named(comparison.coarse)}; take "
            "more samples, or ask for less"
        )
    if comparison.left_out:
        counts = ", ".join(f"{name} in {counted(count, 'case')}" for name, count in comparison.left_out.items())
        yield f"left out for too few samples ({LEAST_SAMPLES} of each launch): {counts}"
    if not comparison.times:
        return
    yield from _least_found(comparison)
    yield f"slower: the noise alone would show as much with a chance of {ALPHA:.0%} or less, all stages together"
    if comparison.launches == 1:
        yield (
            "noise: within launches only; two launches of the same thing differ by more, which one OLD cannot tell: "
            f"give at least {LEAST_LAUNCHES}"
        )
    else:
        yield f"noise: between the {counted(comparison.launches, 'launch')} of OLD, and within launches"


def _least_found(comparison: Comparison) -> Iterator[str]:
    known = [one for one in comparison.times if one.case == ALL_CASES and one.change.detectable is not None]
    if known:
        worst = max(known, key=lambda one: one.change.detectable or 0)
        yield (
            f"slowdowns below {worst.change.detectable or 0:+.1%} may go unnoticed: {worst.arm}/{worst.stage}, the "
            "noisiest of those judged over all cases"
        )


def _named(keys: Sequence[Key]) -> str:
    return ", ".join("/".join(key) for key in keys)


def judgement_of(time: TimeFinding, comparison: Comparison) -> str:
    """The judgement of a time in a word or two."""
    if time.change.slower or time.change.faster:
        return "slower" if time.change.slower else "faster"
    if (time.arm, time.stage, time.case) in comparison.suspect:
        return "suspect"
    return "not judged" if (time.arm, time.stage) in comparison.unjudged else "same"


def _time_line(time: TimeFinding, word: str) -> str:
    change = time.change
    summed = f" summed over {counted(time.cases, 'case')}" if time.cases > 1 else ""
    found = f"{time.old_us:.1f} → {time.new_us:.1f} µs{summed}, {change.change:+.1%}"
    if change.detectable is None:
        bound = "no change of any size could have been found"
    else:
        bound = f"{POWER:.0%} of slowdowns of {change.detectable:+.1%} would have been found"
    if change.between is not None:
        bound += f", launches lie {change.between:.1%} apart"
    samples = " and ".join(map(str, change.samples))
    return f"{word:<14} {time.arm}/{time.stage}, {time.case or 'all cases'}: {found}; {bound} ({samples} samples)"
