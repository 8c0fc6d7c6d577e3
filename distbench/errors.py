"""Everything that ends a run early, and the exit codes of all verdicts.

DistbenchError
├── InvalidCase        the case, a file or the environment makes no sense      INVALID, exit 2
├── Unsupported        this machine lacks what the case needs                  UNSUPPORTED, exit 77
├── Overflow           more rows than a sender or a receiver has room for      OVERFLOW, exit 1
└── BrokenContract     a plugin breaks a rule of its interface                 RANK_FAULT, exit 3
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from enum import Enum


class Verdict(str, Enum):
    """Ending of a case, most fundamental cause first (docs/verdicts.md)."""

    INVALID = "INVALID"
    UNSUPPORTED = "UNSUPPORTED"
    HANG = "HANG"
    RANK_FAULT = "RANK_FAULT"
    OVERFLOW = "OVERFLOW"
    BASELINE_WRONG = "BASELINE_WRONG"
    CORRUPT = "CORRUPT"
    UNDER_LIMIT = "UNDER_LIMIT"
    NONDETERMINISTIC = "NONDETERMINISTIC"
    DRIFT = "DRIFT"
    PASS = "PASS"  # noqa: S105 - a verdict, not a password

    @property
    def exit_code(self) -> int:
        """The process exit code of this verdict."""
        return _EXIT_CODES.get(self, 1)

    @property
    def meaning(self) -> str:
        """The verdict in words."""
        return _MEANINGS[self]


_MEANINGS = {
    Verdict.INVALID: "the case makes no sense, and nothing ran",
    Verdict.UNSUPPORTED: "this machine lacks what the case needs",
    Verdict.HANG: "a rank stood still",
    Verdict.RANK_FAULT: "a rank was lost",
    Verdict.OVERFLOW: "more rows than there is room for",
    Verdict.BASELINE_WRONG: "the padded layer itself is wrong",
    Verdict.CORRUPT: "rows are wrong that the limit does not explain",
    Verdict.UNDER_LIMIT: "the limit cuts off received rows",
    Verdict.NONDETERMINISTIC: "the same pass has other bits when it is repeated",
    Verdict.DRIFT: "bits changed within what another kernel explains",
    Verdict.PASS: "no bit changed that must not change, on any rank",
}

_EXIT_CODES = {
    Verdict.INVALID: 2,
    Verdict.UNSUPPORTED: 77,
    Verdict.HANG: 3,
    Verdict.RANK_FAULT: 3,
    Verdict.PASS: 0,
}


OUT_OF_TIME = 75
"""Exit code of a suite whose results are as expected but whose time ended before its last case (EX_TEMPFAIL)."""

# A suite's exit code is its worst case's: lost rank, then wrong result, then bad case, then missing part.
_WORST_FIRST = (3, 1, 2, 77, OUT_OF_TIME, 0)


def exit_meaning(exit_code: int) -> str:
    """An exit code of a suite in words."""
    return _EXIT_MEANINGS.get(exit_code, "a crash of the bench")


_EXIT_MEANINGS = {
    0: "as expected",
    1: "wrong results",
    2: "an invalid case",
    3: "ranks lost or not started",
    OUT_OF_TIME: "out of time",
    77: "something is missing here",
}


def worst_exit_code(codes: Iterable[int]) -> int:
    """The exit code of `codes` taken together; 0 for none."""
    return min(codes, key=_WORST_FIRST.index, default=0)


def suite_code(exit_code: int, *, as_expected: bool) -> int:
    """Contribution of a case to its suite's exit code: 0 where it ended as expected, else never 0."""
    return 0 if as_expected else exit_code or 1


class DistbenchError(Exception):
    """An ending with a verdict: the message names the value, the bound and the fix, on one line."""

    verdict = Verdict.RANK_FAULT

    @property
    def label(self) -> str:
        """The word that the message begins with."""
        return self.verdict.value

    @property
    def exit_code(self) -> int:
        """The exit code of this error's verdict."""
        return self.verdict.exit_code


class InvalidCase(DistbenchError):
    """The case, a file it names or the environment makes no sense."""

    verdict = Verdict.INVALID


class Unsupported(DistbenchError):
    """This machine lacks a part that the case needs; no other part replaces it."""

    verdict = Verdict.UNSUPPORTED


class Overflow(DistbenchError):
    """A sender or a receiver was asked for more rows than it has room for."""

    verdict = Verdict.OVERFLOW


class BrokenContract(DistbenchError):
    """A plugin breaks a rule of its interface on this rank (docs/plugins.md); the message names plugin and rule."""


class Busy(DistbenchError):
    """Another process holds a resource that this run needs exclusively. Not a verdict: no case was examined."""

    label = "BUSY"
    exit_code = 3


class OutOfTime(DistbenchError):
    """The time of a suite is over. Not a verdict: the case under way has none."""

    label = "OUT_OF_TIME"
    exit_code = OUT_OF_TIME


class LaunchFailed(DistbenchError):
    """The ranks could not be started, or left nothing. Not a verdict: no case is to blame."""

    label = "LAUNCH_FAILED"
    exit_code = 3


class DiskFull(DistbenchError):
    """No disk space was left for an output. Not a verdict: no case is to blame."""

    label = "DISK_FULL"
    exit_code = 3

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; free some space or name another folder")


class ResultsLost(DistbenchError):
    """Another process removed or changed results while ranks ran. Not a verdict: no case is to blame."""

    label = "RESULTS_LOST"
    exit_code = 3

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; no rank is left: keep other processes out of the folder, or name another one with --out"
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
