"""A rank's answer to STACKS_SIGNAL: its Python stacks, and the NCCL flight recorder's state of its device.

A separate thread takes the signal. The main thread may be in a driver call that no signal interrupts; the dump, which
faulthandler writes in the signal handler, needs neither that thread nor the interpreter's lock.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from distbench.distributed.flight_recorder import Group, as_line, last_collectives
from distbench.utils.signals import STACKS_SIGNAL

_DUMP = "_dump_nccl_trace_json"
_MANY = 64


def answer_with_stacks(path: Path) -> None:
    """Write stacks to a new file at `path` whenever this process gets STACKS_SIGNAL. Call once, in the main thread."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(STACKS_SIGNAL, lambda *_: None)  # the interpreter's own handler writes to `writer` at once
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=True)
    threading.Thread(target=_add_recorder, args=(reader, file), name="stacks", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {STACKS_SIGNAL})  # here, and in every thread that is started from here


def _add_recorder(reader: int, file: int) -> None:
    """Append the flight recorder's state after each dump. Needs the interpreter's lock, so it may never happen."""
    while signals := os.read(reader, _MANY):
        if STACKS_SIGNAL in signals and (groups := _recorded()):
            os.write(file, f"{as_line(groups)}\n".encode())


def _recorded() -> list[Group]:
    """Last collectives of each NCCL group; empty where torch has no NCCL, or no recorder in JSON."""
    import torch  # noqa: PLC0415 - a rank has loaded it

    functions = vars(getattr(torch._C, "_distributed_c10d", None) or object)  # noqa: SLF001 - torch names no other way
    dump: Callable[..., bytes | str] | None = functions.get(_DUMP)
    return [] if dump is None else last_collectives(dump(includeCollectives=True, onlyActive=False))
