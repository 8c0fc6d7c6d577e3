"""A failure as plain text to paste into an issue: what ran, how it ended, where it went wrong. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from distbench.case.spec import UNSTORED_KEYS
from distbench.case.stages import Arm
from distbench.report.console import verdict_line
from distbench.report.schema import Report
from distbench.utils.text import counted, numbers, printable

MOST_CHARACTERS = 20_000
"""Length of the text; GitHub takes 65,536 characters in an issue."""

_MOST_LINES, _MOST_IN_A_LINE = 12, 600
_FENCE = "```"


def summary_text(report: Report, notes: Sequence[str]) -> str:
    """The text of a report; `notes` say what is sent beside it.

    It is one fenced block of Markdown, so that nothing in it is markup, a mention or a link where it is pasted; control
    characters are escaped.
    """
    lines = [_line(line) for line in (*_lines(report), "", *notes)]
    kept: list[str] = []
    room = MOST_CHARACTERS
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            kept.append("… (more in report.json)")
            break
        kept.append(line)
    return "\n".join([f"{_FENCE}text", *kept, _FENCE, ""])


def _line(text: str) -> str:
    told = printable(text).replace(_FENCE, "'''")
    return told if len(told) <= _MOST_IN_A_LINE else f"{told[:_MOST_IN_A_LINE]}…"


def _lines(report: Report) -> Iterator[str]:
    yield verdict_line(report)
    expected = "as expected" if report.as_expected else f"expected {report.expect}"
    yield f"case {report.name}, {_hash(report)}: exit {report.exit_code}, {expected}; ended {report.ended or 'unknown'}"
    if report.limit is not None:
        yield str(report.limit)
    if report.injected:
        yield f"injected fault: {report.case.get('inject')}"
    yield from _section("case, without defaults", _keys(report))
    yield from _section("reasons", (reason.message for reason in report.reasons))
    yield from _section("diagnosis", (f"{one.cause} ({one.confidence}): {one.evidence}" for one in report.diagnosis))
    if report.first_divergence is not None:
        yield from _section("first wrong place", [str(report.first_divergence)])
    yield from _section("comparisons", _comparisons(report))
    yield from _section("kernels", _kernels(report))
    yield from _section("warnings", report.warnings)
    yield from _section("environment", _environment(report))


def _hash(report: Report) -> str:
    return str(report.case.get("hash", ""))[:12]


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Indented lines below a title; nothing where there are none."""
    found = list(lines)
    if found:
        yield ""
        yield f"{title}:"
        yield from (f"  {line}" for line in found[:_MOST_LINES])
        if len(found) > _MOST_LINES:
            yield f"  … {len(found) - _MOST_LINES} more in report.json"


def _keys(report: Report) -> Iterator[str]:
    """Keys that something set, on one line for each source."""
    by_source: dict[str, list[str]] = {}
    for key, value in report.case.items():
        source = report.sources.get(key, "default")
        if source != "default" and key not in UNSTORED_KEYS:
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            by_source.setdefault(source, []).append(f"{key} {shown}")
    yield from (f"{source}: {', '.join(keys)}" for source, keys in by_source.items())


def _comparisons(report: Report) -> Iterator[str]:
    for one in report.comparison:
        differing = (
            f"{one.differing_tokens} of {counted(one.tokens, 'token')}, {one.differing_elements} elements differ"
        )
        yield f"{' / '.join(one.arms)}: {'equal' if one.equal else differing}"
    for error in report.errors:
        if not error.within:
            yield f"error of {error.arm}, {error.stage}: outside its bounds ({error.ratio} of ideal)"


def _kernels(report: Report) -> Iterator[str]:
    """Kernels by arm, ranks that run the same one together; control and repadded run the padded kernel."""
    for arm in (Arm.PADDED, Arm.TRUNCATED, Arm.PRODUCTION):
        alike: dict[str, list[int]] = {}
        for rank in report.ranks:
            if arm in rank.kernels:
                names = [str(rank.kernels[arm][key]) for key in ("stage1", "stage2") if rank.kernels[arm].get(key)]
                alike.setdefault(", ".join(names), []).append(rank.rank)
        yield from (f"{arm}, ranks {numbers(ranks)}: {names}" for names, ranks in alike.items() if names)


def _environment(report: Report) -> Iterator[str]:
    found = report.environment
    for title, facts in (("versions", found.versions), ("commits", found.commits), ("system", found.system)):
        if facts:
            yield f"{title}: {', '.join(f'{name} {value}' for name, value in facts.items())}"
    yield f"hosts: {', '.join(found.hosts) or 'unknown'}; devices: {', '.join(found.devices) or 'unknown'}"
    if report.transport:
        yield f"transport: {', '.join(f'{name} {value}' for name, value in report.transport.items())}"
    if found.variables:
        yield f"variables: {' '.join(f'{name}={value}' for name, value in found.variables.items())}"
