"""The page of results: of one case, of a sweep, or of a suite."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from markupsafe import Markup

from distbench.errors import InvalidCase
from distbench.report.html.case_page import case_page
from distbench.report.html.page import fragment, render
from distbench.report.html.suite_page import ALL_DETAILED, cell_of, suite_page
from distbench.report.html.sweep_page import SweepPage, sweep_page
from distbench.report.html.view import pictured
from distbench.report.results import Results
from distbench.report.schema import Report
from distbench.report.sweep import sweep_row
from distbench.utils.text import one_line

MOST_DETAILS = 3 << 20
"""Bytes of all cases' details; cases after these have none, so that a page stays below 5 MiB."""

_RUN, _SWEEP = "distbench run", "distbench sweep"


def page_of(results: Results) -> str:
    """The page of the results: one case alone, a sweep, or a suite.

    Raises:
        InvalidCase: the results cannot be read.

    """
    found = list(results)
    suites = {result.suite for result in found}
    summary, missing = results.summary, results.missing
    if len(found) == 1 and not missing and (suites == {_RUN} or not results.path.is_dir()):
        (raw,) = (raw for raw, _ in results.lines())
        page = case_page(pictured(raw))
        return render("case.html", title=f"{page.report.verdict.value}: {page.report.name}", page=page)
    everything = len(found) <= ALL_DETAILED
    details, left_out = _details(results, everything=everything)
    cells = [cell_of(number, result, detailed=number in details) for number, result in enumerate(found)]
    named = {summary.suite} if summary else set()
    title = ", ".join(sorted(filter(None, suites | named))) or "results"
    stopped = summary.stopped if summary else ""
    return render(
        "suite.html",
        title=title,
        page=suite_page(title, cells, missing, results.exit_code, stopped),
        sweep=_sweep(results) if suites == {_SWEEP} else None,
        details=details,
        cells=cells,
        left_out=left_out,
        everything=everything,
    )


def _details(results: Results, *, everything: bool) -> tuple[dict[int, Markup], int]:
    """Details by number of the case, up to MOST_DETAILS, and how many cases found no room."""
    made: dict[int, Markup] = {}
    left_out = size = 0
    for number, (raw, result) in enumerate(results.lines()):
        if result.as_expected and not everything:
            continue
        if size < MOST_DETAILS and len(made) < ALL_DETAILED:
            made[number] = fragment("case_body.html", page=case_page(pictured(raw)), level=2)
            size += len(made[number].encode())
        else:
            left_out += 1
    return made, left_out


def _sweep(results: Results) -> SweepPage:
    return sweep_page([(report, sweep_row(report)) for report in _whole(results)])


def _whole(results: Results) -> Sequence[Report]:
    try:
        return [msgspec.json.decode(raw, type=Report) for raw, _ in results.lines()]
    except (ValueError, RecursionError) as error:
        message = f"report html: {results.path}: {one_line(error)}; give results that distbench wrote"
        raise InvalidCase(message) from error
