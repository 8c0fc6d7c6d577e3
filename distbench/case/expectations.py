"""Expected ending of a suite's case: a verdict, optionally with reason codes, or derived from the limit."""

from __future__ import annotations

from collections.abc import Iterable

from distbench.errors import Verdict

BY_LIMIT = "by-limit"
"""UNDER_LIMIT where the limit loses rows of this batch and is not guarded, else PASS."""
BY_KERNEL = "by-kernel"
"""NONDETERMINISTIC where the kernel of the padded arm adds atomically, else PASS: known before a rank starts."""

CODES = (
    "dispatch-differs",
    "truncate-differs",
    "experts-differs",
    "combine-differs",
    "nan",
    "error",
    "reference",
    "far",
    "bits-differ",
    "disputed",
    "timed-differs",
    "replay-differs",
    "layer-graph",
    "limit-below-total-recv",
    "damage",
    "control-differs",
    "repadded-differs",
    "truncated-differs",
    "kernel-drift",
    "hang",
    "rank-fault",
    "baseline-fault",
    "invalid",
    "unsupported",
    "overflow",
)
"""Codes of the reasons behind a verdict (docs/verdicts.md)."""

_WORDS = ", ".join((BY_LIMIT, BY_KERNEL, *(verdict.value for verdict in Verdict)))
ALLOWED = f"{_WORDS}, or VERDICT:CODE,CODE (docs/suites.md)"


def is_expectation(text: str) -> bool:
    """Whether `text` is a valid expectation."""
    if text in {BY_LIMIT, BY_KERNEL}:
        return True
    verdict, colon, codes = text.partition(":")
    known = verdict in Verdict.__members__ and verdict != Verdict.PASS.value
    return (known and set(codes.split(",")) <= set(CODES)) if colon else verdict in Verdict.__members__


def expected_verdict(expect: str) -> str:
    """The verdict that an expectation names; empty for one that follows from the limit or the kernel."""
    return "" if expect in {BY_LIMIT, BY_KERNEL} else expect.partition(":")[0]


def is_met(expect: str, verdict: Verdict, codes: Iterable[str], *, safe: bool, policy: str) -> bool:
    """Whether a case ended as expected: with the verdict and, where codes are named, for no other reason.

    `codes` are those of all reasons for the verdict, which is the worst one found. `safe`: the limit loses no row of
    this batch.
    """
    if expect == BY_LIMIT:
        return verdict is (Verdict.PASS if safe or policy == "guard" else Verdict.UNDER_LIMIT)
    wanted, colon, named = expect.partition(":")
    return verdict.value == wanted and (not colon or set(codes) <= set(named.split(",")))
