"""The process that starts the ranks and watches them: torchrun's own agent, over ranks forked from one interpreter.

torchrun starts every rank as a new interpreter, and each imports torch for itself. Here the agent's start method is
`forkserver`: one process imports torch once, and the ranks are forked from it. The agent runs in a thread; the main
thread reads the ranks' breadcrumbs, and handles signals.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import FrameType

from distbench.hang import find_hang
from distbench.job import Job, ranks_folder
from distbench.postmortem import Ending, Exit, explain_fault, positions
from distbench.process import is_alive

# Ctrl-C, a scheduler that takes the node back, a terminal that was closed.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)

_MONITOR_S = 0.1
_TICK_S = 0.1
# A rank that is gone is left to the agent for so long; a stopped peer would keep the agent waiting for 30 s.
_AGENT_GRACE_S = 2.0
# After a signal the agent has so long to end; what it still waits for is a rank that has not come up.
_INTERRUPT_GRACE_S = 8.0


class Interrupted(Exception):
    """A signal asked for the end; the ranks are gone."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def preload_ranks() -> None:
    """Begin to import torch in the process that ranks are forked from, while this one goes on.

    A terminal's Ctrl-C, and its end, reach that process too, and are for this one to act upon.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["distbench.lifeline", "distbench.worker"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL_SIGNALS)  # once more: that has unblocked SIGINT
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def supervise(job: Job, tick: Callable[[], None], signals: Sequence[int]) -> Ending | None:
    """Run `job` until all its ranks have ended; None if they came to the end, else why not.

    `tick` is called about ten times a second. `signals` is what `collect_signals` yields.

    Raises:
        Interrupted: one of ENDING_SIGNALS; no rank is left.

    """
    _clear(Path(job.out))
    agent = _Agent(job)
    watch = _Watch(job)
    agent.start()
    while agent.is_alive():
        agent.join(_TICK_S)
        tick()
        if signals:
            _end(agent, watch)
            raise Interrupted(signals[0])
        watch.look()
    if watch.hang is not None:
        return watch.hang
    if agent.finished:
        return None
    first = agent.first_exit
    return explain_fault(job, watch.first_gone if first is None or first.rank in watch.killed else first)


def _end(agent: _Agent, watch: _Watch) -> None:
    """Kill the ranks, also those that are only just coming up."""
    deadline = time.monotonic() + _INTERRUPT_GRACE_S
    while agent.is_alive() and time.monotonic() < deadline:
        watch.kill()
        agent.join(_TICK_S)


def start_rank(job: Job) -> int:
    """Enter a rank's process; everything heavy is loaded there, not in the process that watches."""
    from distbench.worker import work  # noqa: PLC0415

    for number in _TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return work(job)


class _Agent(threading.Thread):
    """torchrun's agent, in a thread of its own."""

    def __init__(self, job: Job) -> None:
        super().__init__(name="torchrun-agent", daemon=True)
        self._job = job
        self.finished = False
        self.first_exit: Exit | None = None

    def run(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs  # noqa: PLC0415
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

        logging.getLogger("torch").setLevel(logging.CRITICAL)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._job.num_ranks,
            run_id=f"distbench-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="forkserver",
            monitor_interval=_MONITOR_S,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )
        try:
            elastic_launch(config, start_rank)(self._job)
            self.finished = True
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            self.first_exit = Exit(rank, how)


class _Watch:
    """What the main thread sees of the ranks."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._gone_since: float | None = None
        self.first_gone: Exit | None = None
        self.hang: Ending | None = None
        self.killed: set[int] = set()

    def look(self) -> None:
        """Note ranks that are gone, and end the launch where one stands still or is gone too long."""
        seen = positions(self._job)
        if self._gone_since is None:
            gone = [rank for rank, at in seen.items() if at.stage_name != "done" and not is_alive(at.pid)]
            if gone:
                self._gone_since = time.monotonic()
                self.first_gone = Exit(gone[0], "exit code 0 before it was done")
        elif time.monotonic() - self._gone_since > _AGENT_GRACE_S:
            self.kill()
        if self.hang is None and self._gone_since is None:
            self.hang = find_hang(self._job, seen)
            if self.hang is not None:
                self.kill()

    def kill(self) -> None:
        """Kill every rank that is left."""
        for rank, at in positions(self._job).items():
            if is_alive(at.pid):
                self.killed.add(rank)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(at.pid, signal.SIGKILL)


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect ENDING_SIGNALS instead of dying of them; yields the list that they go to. nohup keeps its meaning."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clear(out: Path) -> None:
    shutil.rmtree(ranks_folder(out), ignore_errors=True)
    ranks_folder(out).mkdir(parents=True)
