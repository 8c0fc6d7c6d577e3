"""Damage for tests with real processes: DISTBENCH_TEST_FAULT=rank:case:place:kind, as in 2:0:padded/dispatch:kill.

A place may end in #2: the second visit of the rank in that case. `boot` is before its first heartbeat.
Several faults at once are joined by +.
With DISTBENCH_TEST_FAULT_ONCE=path a fault fires once; others may follow after commas, each for the launch after that
of the one before it. `path` holds a byte for each that has fired.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_LAUNCHES = tuple(filter(None, os.environ.get("DISTBENCH_TEST_FAULT", "").split(",")))
_ONCE = os.environ.get("DISTBENCH_TEST_FAULT_ONCE", "")


def _segfault() -> None:
    import ctypes  # noqa: PLC0415

    ctypes.string_at(0)


def _raise() -> None:
    message = "injected"
    raise ValueError(message)


def _allocate() -> None:
    import resource  # noqa: PLC0415

    import torch  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    torch.empty(16 << 30, dtype=torch.uint8)


def _fill() -> None:
    import errno  # noqa: PLC0415

    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/results.jsonl")


KINDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "pause": lambda: time.sleep(1.5),
    "exit": lambda: os._exit(0),
    "segv": _segfault,
    "raise": _raise,
    "allocate": _allocate,
    "full": _fill,
}


def _fired() -> int:
    return Path(_ONCE).stat().st_size if _ONCE and Path(_ONCE).exists() else 0


class _Armed:
    """Faults of this rank in this launch, and its number of visits to each place of the current case."""

    def __init__(self) -> None:
        self._launch = _fired()
        self._faults = [fault for faults in _LAUNCHES[self._launch :][:1] for fault in faults.split("+")]
        self._case = -1
        self._visits: dict[str, int] = {}

    def enter(self, case_index: int, place: str) -> None:
        if case_index != self._case:
            self._case, self._visits = case_index, {}
        self._visits[place] = self._visits.get(place, 0) + 1
        here = (place, f"{place}#{self._visits[place]}")
        for fault in self._faults:
            rank, case, where, kind = fault.split(":")
            if rank == os.environ.get("RANK") and case == str(case_index) and where in here:
                if _ONCE:
                    Path(_ONCE).write_bytes(b"." * (self._launch + 1))
                KINDS[kind]()


if _LAUNCHES:
    from distbench.case.stages import Stage
    from distbench.distributed.heartbeat import Heartbeat

    _mark = Heartbeat.mark
    _armed: list[_Armed] = []

    def _marked(heartbeat: Heartbeat, stage: Stage) -> None:
        _mark(heartbeat, stage)
        at = heartbeat.position()
        _armed[0].enter(at.case_index, at.place)

    _open = Heartbeat.__init__

    def _opened(heartbeat: Heartbeat, path: Path | None) -> None:
        _armed.append(_Armed())
        _armed[0].enter(0, "boot")
        _open(heartbeat, path)

    Heartbeat.__init__ = _opened  # type: ignore[assignment, method-assign]
    Heartbeat.mark = _marked  # type: ignore[assignment, method-assign]

if os.environ.get("DISTBENCH_TEST_UNGUARDED"):
    from tests.faulty_site.unguarded import remove_guards

    remove_guards()
