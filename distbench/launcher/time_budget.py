"""Cases that can still end before the deadline, estimated from the times of finished ones."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping

import msgspec

from distbench.case.spec import Case
from distbench.case.timeouts import case_work

# Cases of one class differ by up to twice the work, and machines are not always equally fast.
_MARGIN = 1.5
# Slurm kills a job at its end time: ranks have to end, and reports to be written, before that.
SLURM_END = "SLURM_JOB_END_TIME"
SLURM_RESERVE_S = 30.0
_MOST_SECONDS = 366 * 86400.0
_SLURM_TIME = re.compile(r"[1-9]\d{0,15}", re.ASCII)


class Deadline(msgspec.Struct, frozen=True, kw_only=True):
    """The moment by which a suite has to end, on this machine's monotonic clock, and its source, in words."""

    at_s: float
    source: str

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative afterwards."""
        return self.at_s - time.monotonic()


def earliest_deadline(seconds: float | None, environ: Mapping[str, str]) -> Deadline | None:
    """Deadline of a command that may take `seconds` from now, or of its Slurm job, whichever is earlier.

    Infinity sets no deadline, regardless of Slurm.
    """
    if seconds == math.inf:
        return None
    found = []
    now = time.monotonic()
    if seconds is not None:
        found.append(Deadline(at_s=now + seconds, source=f"--for {seconds:g} s"))
    left = _slurm_seconds(environ)
    if left is not None:
        source = f"{SLURM_RESERVE_S:g} s before the end of the Slurm job ({SLURM_END}; --for none disregards it)"
        found.append(Deadline(at_s=now + left - SLURM_RESERVE_S, source=source))
    return min(found, key=lambda one: one.at_s, default=None)


def _slurm_seconds(environ: Mapping[str, str]) -> float | None:
    """Seconds until the job's end; None where Slurm gives none, as for a job without a limit."""
    text = environ.get(SLURM_END, "")
    if not _SLURM_TIME.fullmatch(text):
        return None
    left = int(text) - time.time()
    return left if left < _MOST_SECONDS else None


class Pace:
    """Seconds that cases took, by class of work: the longest for each power of two of work."""

    def __init__(self, known: Mapping[int, float] | None = None) -> None:
        """Begin with an earlier launch's measurements, as `by_class` has them."""
        self.by_class = dict(known or {})

    def note(self, case: Case, seconds: float) -> None:
        """Record the time of a finished case; a case that never ran has none."""
        number = _class_of(case)
        if seconds > 0:
            self.by_class[number] = max(seconds, self.by_class.get(number, 0.0))

    def estimate_s(self, case: Case) -> float:
        """Seconds that a case may take; 0 where no case has been timed.

        Uses its class, else the next larger class, or the next smaller one in proportion to the work.
        """
        number = _class_of(case)
        larger = [self.by_class[one] for one in sorted(self.by_class) if one >= number][:1]
        smaller = [self.by_class[one] * 2.0 ** (number - one) for one in sorted(self.by_class) if one < number][-1:]
        known = larger if number in self.by_class else larger + smaller
        return min(known, default=0.0) * _MARGIN

    def fits(self, case: Case, deadline: Deadline | None) -> bool:
        """Whether a case that starts now can be expected to end by the deadline."""
        return deadline is None or self.estimate_s(case) < deadline.left_s

    def shortest(self, cases: Iterable[Case]) -> float:
        """The smallest estimate, in seconds."""
        return min(map(self.estimate_s, cases), default=0.0)


def _class_of(case: Case) -> int:
    return math.floor(math.log2(case_work(case)))
