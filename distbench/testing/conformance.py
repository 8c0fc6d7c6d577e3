"""The rules that transports and experts keep, each a case of the built-in suite `conformance` (docs/conformance.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from distbench.errors import Verdict, suite_code, worst_exit_code
from distbench.report.schema import Report

SUITE = "conformance"
_NOT_RUN = "not run"

RULES: dict[str, str] = {
    "one-token": "one token on each rank arrives, is computed and comes back",
    "zero-tokens": "every other rank has no token, and takes part in each call all the same",
    "no-tokens": "no rank has a token",
    "uneven-tokens": "ranks have 33, 1, 16 and 64 tokens",
    "own-rank-only": "all rows stay on their rank",
    "all-to-one-rank": "one rank receives every token, the others none",
    "shared-ranks": "a token with several experts on a rank is sent there once, and added once",
    "capacity": "a rank receives as many rows as its receive buffer has",
    "overflow": "one row more is refused before anything moves",
    "many-calls": "buffers are used again, in more than twenty calls",
    "other-contents": "other rows of the same routing leave nothing of those before; errors are those of the ideal",
    "fp8": "an fp8 payload arrives with its scales",
    "odd-widths": "columns and experts in numbers that are no power of two",
    "dropped-slots": "an id of -1 is no expert, and a token that has no other comes back as zeros",
    "shared-experts": "each rank holds the same shared experts, in slots that its own tokens have besides their top-k",
    "cut": "experts give the same bits when they get the first rows of the receive buffer only",
    "lossy-cut": "a cut that is one row short loses that row and changes no other",
}
"""What is held, by the name of the case."""


class Held(NamedTuple):
    """Whether a rule is held: `yes`, `NO`, or `not stated` where a part does not support the case; and the evidence."""

    rule: str
    held: str
    told: str


def with_merged(reports: Iterable[Report], merged: Iterable[tuple[str, str]]) -> list[Report]:
    """The reports, and that of each case in `merged` by both names: few ranks make equal cases of some rules."""
    by_name = {report.name: report for report in reports}
    others = [(name, by_name[first]) for name, first in merged if first in by_name]
    return [*by_name.values(), *(msgspec.structs.replace(report, name=name) for name, report in others)]


def judge(reports: Iterable[Report]) -> list[Held]:
    """Rules in their order, as the reports of their cases say; a rule without a report was not run."""
    by_name = {report.name: report for report in reports}
    return [_judge(rule, by_name.get(rule)) for rule in RULES]


def _judge(rule: str, report: Report | None) -> Held:
    if report is None:
        return Held(rule, _NOT_RUN, "")
    if report.as_expected:
        return Held(rule, "yes", RULES[rule])
    told = "; ".join(reason.message for reason in report.reasons[:1])
    if report.verdict is Verdict.UNSUPPORTED:
        return Held(rule, "not stated", told)
    return Held(rule, "NO", f"{report.verdict.value}: {told}")


def exit_code(reports: Iterable[Report]) -> int:
    """0 where every rule is held that the parts state, 77 where they state none, else that of the worst case.

    A rule without a report is one whose ranks were lost.
    """
    listed = list(reports)
    if any(one.held == _NOT_RUN for one in judge(listed)):
        return Verdict.RANK_FAULT.exit_code
    stated = [report for report in listed if report.as_expected or report.verdict is not Verdict.UNSUPPORTED]
    if not stated:
        return Verdict.UNSUPPORTED.exit_code
    return worst_exit_code(suite_code(report.exit_code, as_expected=report.as_expected) for report in stated)
