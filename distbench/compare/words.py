"""A comparison as a person reads it, what is worst first."""

from __future__ import annotations

from collections.abc import Iterator

from distbench.compare.comparison import ALL_CASES, Comparison, TimeFinding
from distbench.compare.noise import ALPHA, LEAST_SAMPLES, POWER

_SHOWN = 50
_WORST_FIRST = ("regressed", "new failure", "absent", "another case", "time absent", "still failing", "fixed")


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
    if comparison.unjudged:
        names = ", ".join("/".join(key) for key in comparison.unjudged)
        yield f"not judged: {names}: too few samples (at least {LEAST_SAMPLES} of each) or too much noise"
    if comparison.times:
        yield f"slower: the noise alone would show as much with a chance of {ALPHA:.0%} or less, all stages together"
    yield f"exit {comparison.exit_code}: {comparison.pairs} cases compared"


def _time_line(time: TimeFinding) -> str:
    change = time.change
    word = "slower" if change.slower else "faster" if change.faster else "same"
    found = f"{change.change:+.1%}"
    if change.detectable is None:
        bound = "no change of any size could have been found"
    else:
        bound = f"{POWER:.0%} of slowdowns of {change.detectable:+.1%} would have been found"
    samples = " and ".join(map(str, change.samples))
    return f"{word:<14} {time.arm}/{time.stage}, {time.case or 'all cases'}: {found}; {bound} ({samples} samples)"
