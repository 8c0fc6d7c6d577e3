"""A comparison as a person reads it, what is worst first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distbench.compare.comparison import ALL_CASES, Comparison, Key, TimeFinding
from distbench.compare.launches import LEAST_LAUNCHES
from distbench.compare.noise import ALPHA, LEAST_SAMPLES, POWER

_SHOWN = 50
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


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """Yield the lines: cases, then stages over all cases, then single cases that changed, then the ending."""
    cases = sorted(comparison.cases, key=lambda found: _WORST_FIRST.index(found.kind))
    for found in cases[:_SHOWN]:
        verdicts = " → ".join(filter(None, (found.old, found.new)))
        yield f"{found.kind:<14} {found.name}: {verdicts}{': ' if found.message else ''}{found.message}"
    if len(cases) > _SHOWN:
        yield f"and {len(cases) - _SHOWN} cases more"
    for time in sorted(comparison.times, key=lambda one: one.case != ALL_CASES):
        yield _time_line(time)
    yield from _limits(comparison)
    told = [f"{comparison.pairs} cases compared"]
    told += [f"{len(comparison.unjudged)} arms and stages not judged"] if comparison.unjudged else []
    yield f"exit {comparison.exit_code}: {', '.join(told)}"


def _limits(comparison: Comparison) -> Iterator[str]:
    """Yield what the comparison cannot tell."""
    if comparison.untimed:
        yield (
            f"no times compared: no arm and stage has {LEAST_SAMPLES} samples on each side in a case that ended the "
            "same way; --verdicts-only asks for none"
        )
    if comparison.unjudged:
        yield f"not judged: {_named(comparison.unjudged)}: too few samples ({LEAST_SAMPLES} of each) or too much noise"
    if comparison.left_out:
        counts = ", ".join(f"{name} in {count} cases" for name, count in comparison.left_out.items())
        yield f"left out for too few samples ({LEAST_SAMPLES} of each launch): {counts}"
    if comparison.coarse:
        yield f"too much noise to find as little as --detect: {_named(comparison.coarse)}"
    if not comparison.times:
        return
    yield f"slower: the noise alone would show as much with a chance of {ALPHA:.0%} or less, all stages together"
    if comparison.launches == 1:
        yield (
            "noise: within launches only; two launches of the same thing differ by more, which one OLD cannot tell: "
            f"give at least {LEAST_LAUNCHES}"
        )
    else:
        yield f"noise: between the {comparison.launches} launches of OLD, and within launches"


def _named(keys: Sequence[Key]) -> str:
    return ", ".join("/".join(key) for key in keys)


def _time_line(time: TimeFinding) -> str:
    change = time.change
    word = "slower" if change.slower else "faster" if change.faster else "same"
    found = f"{change.change:+.1%}"
    if change.detectable is None:
        bound = "no change of any size could have been found"
    else:
        bound = f"{POWER:.0%} of slowdowns of {change.detectable:+.1%} would have been found"
    if change.between is not None:
        bound += f", launches lie {change.between:.1%} apart"
    samples = " and ".join(map(str, change.samples))
    return f"{word:<14} {time.arm}/{time.stage}, {time.case or 'all cases'}: {found}; {bound} ({samples} samples)"
