"""A summary in Markdown, for the page of a job or a merge request."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

from distbench.case.limits import Proof
from distbench.report.export.totals import DISTBENCH, Totals, quantiles_of
from distbench.report.results import Result, Results
from distbench.utils.text import counted

_PROOFS: dict[Proof, str] = {
    "proven": "under any routing of the case's token counts",
    "this batch": "under the case's own routing; another one of the same token counts may lose rows",
    "unsafe": "not even under the case's own routing",
}
_SHOWN_HOSTS = 32
_SHOWN_CHARACTERS = 300
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&:@^=$\"'/])")


def write(results: Results, file: BinaryIO) -> None:
    """Write the totals of all cases, the first that did not end as expected, and the times by stage."""
    file.write("\n".join(_lines(Totals(results))).encode() + b"\n")


def escape(text: str) -> str:
    """`text` escaped so that it renders literally anywhere in a document, including table cells, on one line."""
    line = " ".join(text.split())
    shown = line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1]}…"
    return _MARKUP.sub(r"\\\1", "".join(one if one.isprintable() else "�" for one in shown))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table, with an empty line before and after it."""
    yield from ("", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}")
    for row in rows:
        yield f"| {' | '.join(escape(str(cell)) for cell in row)} |"
    yield ""


def _lines(totals: Totals) -> Iterator[str]:
    planned = totals.cases + totals.missing
    title = escape(totals.suite if totals.suite.startswith(DISTBENCH) else f"{DISTBENCH} {totals.suite}")
    yield f"# {title}: exit {totals.exit_code}, {totals.as_expected} of {planned} as expected"
    yield ""
    if totals.missing:
        yield f"**{counted(totals.missing, 'case')} without a result.**"
    if totals.plugins:
        yield f"**plugins**: {escape(', '.join(sorted(totals.plugins)))}"
    if totals.stand_ins:
        yield f"**emulated**: {escape(', '.join(sorted(totals.stand_ins)))}"
    hosts = sorted(totals.hosts)
    more = f" and {len(hosts) - _SHOWN_HOSTS} more" if len(hosts) > _SHOWN_HOSTS else ""
    yield f"hosts: {escape(' '.join(hosts[:_SHOWN_HOSTS])) or 'none'}{more}"
    if totals.ended:
        yield f"from {escape(min(totals.ended))} to {escape(max(totals.ended))}"
    yield from table(
        ("verdict", "cases", "not as expected"),
        ((verdict.value, count, totals.unexpected[verdict]) for verdict, count in sorted(totals.verdicts.items())),
    )
    if totals.limits:
        yield "## Limits"
        yield from table(("limit", "cases", "loses no row"), _limits(totals.limits))
    if totals.shown:
        yield "## Not as expected"
        yield from table(("verdict", "expected", "case", "limit", "lost rows", "reason"), map(_row, totals.shown))
        left = sum(totals.unexpected.values()) - len(totals.shown)
        yield f"and {left} more" if left else ""
    if totals.medians_us:
        yield "## Time by stage"
        yield ""
        yield (
            "The slowest rank's median of each case in microseconds, over cases; a harness figure where emulated. "
            "Samples are timed iterations, or the passes whose bits are checked."
        )
        rows = ((*key, *_microseconds(values)) for key, values in totals.medians_us.items())
        yield from table(("arm", "stage", "samples", "median", "p99", "max", "cases"), rows)


def _limits(counts: Mapping[str, int]) -> Iterator[tuple[object, ...]]:
    for status, where in _PROOFS.items():
        if counts.get(status):
            yield status, counts[status], where


def _row(result: Result) -> tuple[str, ...]:
    reason = result.reasons[0].message if result.reasons else ""
    limit = str(result.limit or "")
    return (result.verdict.value, result.expect, result.name, limit, str(result.lost.rows), reason)


def _microseconds(values: array[float]) -> tuple[str, ...]:
    return (*(f"{value:.1f}" for value in quantiles_of(values)), str(len(values)))
