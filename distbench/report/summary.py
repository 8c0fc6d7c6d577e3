"""`summary.json`: the outcome of a suite."""

from __future__ import annotations

import msgspec

from distbench.errors import OUT_OF_TIME, Verdict
from distbench.report.document import RateReport


class Summary(msgspec.Struct, kw_only=True):
    """`summary.json`: counts by verdict, and the first cases that did not end as expected.

    `events` are ranks lost when no case was in flight; `stopped` is the reason why cases were left out, and
    `left_for_time` the number of those left out for lack of time. `selected` holds the hashes of its cases where
    results.jsonl has other results too, and is empty where it has none. `exit_code` is that of the command, without a
    comparison with a baseline. `limits` counts cases by the status of their limit's proof. `rate` has the wrong tokens
    of all cases together, without those that had injected faults or were expected not to pass.
    """

    suite: str = ""
    cases: int = 0
    finished: int = 0
    as_expected: int = 0
    verdicts: dict[str, int] = {}
    limits: dict[str, int] = {}
    exit_code: int = 0
    stopped: str = ""
    left_for_time: int = 0
    events: list[str] = []
    selected: list[str] = []
    unexpected: list[dict[str, str]] = []
    rate: RateReport | None = None

    @property
    def incomplete_codes(self) -> set[int]:
        """Contribution of cases without a result, and of events, to the exit code."""
        lost = self.cases - self.finished > self.left_for_time or self.events
        codes = {Verdict.RANK_FAULT.exit_code} if lost else set()
        return codes | ({OUT_OF_TIME} if self.left_for_time else set())
