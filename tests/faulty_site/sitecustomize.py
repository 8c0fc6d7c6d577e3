"""Damage for tests with real processes: DISTBENCH_TEST_FAULT=rank:case:place:kind, as in 2:0:padded/dispatch:kill."""

from __future__ import annotations

import os
import signal
import time

_FAULT = os.environ.get("DISTBENCH_TEST_FAULT", "")


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


KINDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "exit": lambda: os._exit(0),
    "segv": _segfault,
    "raise": _raise,
    "allocate": _allocate,
}

if _FAULT:
    from distbench import breadcrumbs

    _rank, _case, _place, _kind = _FAULT.split(":")
    _mark = breadcrumbs.Breadcrumbs.mark

    def _marked(crumbs: breadcrumbs.Breadcrumbs, stage: str) -> None:
        _mark(crumbs, stage)
        at = crumbs.position()
        if os.environ.get("RANK") == _rank and at.place == _place and str(at.case_index) == _case:
            KINDS[_kind]()

    breadcrumbs.Breadcrumbs.mark = _marked  # type: ignore[assignment, method-assign]
