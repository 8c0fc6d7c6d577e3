"""The process that starts the ranks and watches them: torchrun's own agent, over ranks forked from one interpreter.

torchrun starts every rank as a new interpreter, and each imports torch for itself. Here the agent's start method is
`forkserver`: one process imports torch once, and the ranks are forked from it. The agent runs in a thread; the main
thread reads the ranks' breadcrumbs, and handles signals.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec

from distbench.case.entry import Entry
from distbench.distributed.heartbeat import Position
from distbench.errors import LaunchFailed, OutOfTime, ResultsLost, Verdict
from distbench.hang import find_hang
from distbench.helpers import end_fork_server, resume_helpers
from distbench.job import Job, Spread, clear_ranks, crumb_path
from distbench.nodes.hub import Hub
from distbench.nodes.wire import BACKEND
from distbench.postmortem import Ending, Exit, explain_fault, positions
from distbench.utils.process import is_alive
from distbench.utils.signals import TERMINAL_SIGNALS, Interrupted
from distbench.utils.text import one_line
from distbench.verify.records import Reason

# glibc keeps memory freed by a case, up to 64 MiB, for the next one, so that no rank is delayed by page faults.
_RANKS_ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_LOOPBACK = "127.0.0.1"
_WAITING = 1024
_MONITOR_S = 0.1
_MEETING_S = 60
_TICK_S = 0.1
# Grace period before a dead rank ends the launch; the agent would wait 30 s for a stopped peer.
_AGENT_GRACE_S = 2.0
# Grace period of the agent after a signal; it may be waiting for a rank that has not come up.
_INTERRUPT_GRACE_S = 8.0
# An agent still running this long after its ranks were killed receives no notice of their ends.
_STUBBORN_S = 4.0


def preload_ranks() -> None:
    """Begin to import torch in the fork server, while this process continues.

    A terminal's Ctrl-C and hang-up reach that process too, but are handled by this one.

    Raises:
        ModuleNotFoundError: torch is not installed.

    """
    if find_spec("torch") is None:
        message = "No module named 'torch'"
        raise ModuleNotFoundError(message, name="torch")
    for name, value in _RANKS_ENVIRON.items():
        os.environ.setdefault(name, value)
    multiprocessing.set_forkserver_preload(["distbench.lifeline", "distbench.worker", "distbench.sharing"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)  # again: the call above unblocked SIGINT
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(resume_helpers)  # the interpreter waits for them at exit


def supervise(
    job: Job, tick: Callable[[Entry | None], None], signals: Sequence[int], hub: Hub | None = None
) -> Ending | None:
    """Run `job` until all its ranks have ended; None if they finished, else the reason.

    `tick` is called about ten times a second, with the case under way. `signals` is the list that `collect_signals`
    yields. `hub` holds the other nodes.

    Raises:
        Interrupted: one of ENDING_SIGNALS. No rank is left, as after any exception.
        ResultsLost: the ranks' files were removed.
        NodesMissing: not all nodes joined.
        LaunchFailed: no rank could be started, or a node cannot take part.
        OutOfTime: the job's deadline has passed; no rank is left.
        DiskFull: a rank had no room for its results.

    """
    clear_ranks(Path(job.out))
    if hub is not None:
        job = hub.begin(job, signals)
    agent = Agent(job)
    agent.store = None if hub is None else hub.store
    watch = Watch(job, agent, hub)
    agent.start()
    with no_rank_left(agent, watch):
        while agent.is_alive() and not watch.given_up:
            agent.join(_TICK_S)
            tick(watch.current)
            if signals or (hub is not None and hub.refused):
                raise Interrupted(signals[0]) if signals else LaunchFailed(hub.refused if hub else "")
            if job.deadline is not None and job.deadline.left_s < 0:
                raise OutOfTime(job.deadline.source)
            watch.look()
    if hub is not None:
        end(agent, watch)
        hub.stop()
        hub.mirror(job)
    return concluded(job, agent, watch, hub)


@contextlib.contextmanager
def no_rank_left(agent: Agent, watch: Watch) -> Iterator[None]:
    """End the ranks when an exception leaves the context."""
    try:
        yield
    except BaseException:
        end(agent, watch)
        raise


def concluded(job: Job, agent: Agent, watch: Watch, hub: Hub | None = None) -> Ending | None:
    """Why an agent has ended; None if its ranks finished.

    Raises:
        LaunchFailed, DiskFull: see `supervise`.

    """
    if watch.ending is not None:
        return watch.ending
    if agent.failure:
        watch.kill()
        raise LaunchFailed(agent.failure)
    if agent.finished and watch.elsewhere is None:
        return None
    ending = explain_fault(job, first_exit(agent, watch))
    return ending if hub is None else _with_hosts(ending, hub)


def first_exit(agent: Agent, watch: Watch) -> Exit | None:
    """The rank that ended first, on its own."""
    first = agent.first_exit
    return watch.first_gone if first is None or first.rank in watch.killed else first


def _with_hosts(ending: Ending, hub: Hub) -> Ending:
    reasons = [
        reason
        if reason.rank is None
        else msgspec.structs.replace(
            reason, message=f"{reason.message} (rank {reason.rank} is on host {hub.place(reason.rank)})"
        )
        for reason in ending.reasons
    ]
    return msgspec.structs.replace(ending, reasons=reasons)


def _lost_hosts(job: Job, hub: Hub, seen: dict[int, Position]) -> Ending | None:
    """The ending where nodes no longer answer; without them no further launch is possible."""
    reasons = []
    here = [at.case_index for at in seen.values() if at.pid]  # other nodes' positions may be older than a case
    for node, host in hub.lost().items():
        ranks = hub.ranks_of(node)
        last = [seen[rank] for rank in ranks if rank in seen]
        place = f"last seen in {min(last, key=lambda at: at.progress).place}" if last else "before its first stage"
        message = f"host {host} (node {node}, rank {ranks[0]} to {ranks[-1]}) is gone or no longer answers, {place}"
        reasons.append(Reason(code="host-lost", rank=ranks[0], message=message))
    if not reasons:
        return None
    index = min(min(here, default=0), len(job.entries) - 1)
    return Ending(verdict=Verdict.RANK_FAULT, case_index=index, reasons=reasons, last=True)


def end(agent: Agent, watch: Watch) -> None:
    """Kill the ranks, including those that are still starting."""
    deadline = time.monotonic() + _INTERRUPT_GRACE_S
    while agent.is_alive() and time.monotonic() < deadline:
        watch.kill()
        agent.join(_TICK_S)


def start_rank(job: Job) -> int:
    """Enter a rank's process; everything heavy is loaded there, not in the process that watches."""
    from distbench.worker import work  # noqa: PLC0415

    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return work(job)


class Agent(threading.Thread):
    """torchrun's agent, in its own thread."""

    def __init__(self, job: Job) -> None:
        super().__init__(name="torchrun-agent", daemon=True)
        self._job = job
        self._others = _children()
        self.finished = False
        self.failure = ""
        self.first_exit: Exit | None = None
        self.store: socket.socket | None = None
        """Rendezvous of the ranks, on node 0 of several."""

    def run(self) -> None:
        """Run the ranks of this node to their end; `failure` is the reason if that was not possible."""
        try:
            self._launch()
        except Exception as error:  # noqa: BLE001 - torch that cannot be loaded: the main thread has to hear of it
            self.failure = f"{type(error).__name__}: {one_line(error)}; distbench doctor looks at this node's torch"

    def _launch(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs  # noqa: PLC0415
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

        from distbench.nodes.rendezvous import register  # noqa: PLC0415

        logging.getLogger("torch").setLevel(logging.CRITICAL)
        register()
        try:
            elastic_launch(
                LaunchConfig(**self._settings(), logs_specs=DefaultLogsSpecs(log_dir=os.devnull)), start_rank
            )(self._job)
            self.finished = True
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            self.first_exit = Exit(rank, how)
        except Exception as error:  # noqa: BLE001 - whatever torchrun raises, the main thread has to hear of it
            told = f"{type(error).__name__} of torchrun's agent: {one_line(error)}"
            spread = self._job.spread
            if spread is None:
                self.failure = f"{told}; distbench doctor looks at this node's limits"
            else:
                self.first_exit = Exit(spread.node * spread.nproc, told)

    def _settings(self) -> dict[str, Any]:
        """Settings of torchrun. The rendezvous store listens on loopback if all ranks are on one node."""
        spread, store = self._job.spread, self.store
        listener: int | None = None
        run_id = f"distbench-{os.getpid() if spread is None else spread.launch}"
        if spread is None:
            store = socket.create_server((_LOOPBACK, 0), backlog=_WAITING)
            port = store.getsockname()[1]
            spread = Spread(nodes=1, node=0, nproc=self._job.num_ranks, host=_LOOPBACK, port=port, launch=0)
            listener = store.detach()
        elif store is not None:
            listener = os.dup(store.fileno())
        return {
            "min_nodes": spread.nodes,
            "max_nodes": spread.nodes,
            "nproc_per_node": spread.nproc,
            "run_id": run_id,
            "rdzv_backend": BACKEND,
            "rdzv_configs": {"timeout": _MEETING_S, "spread": spread, "listener": listener},
            "start_method": "forkserver",
            "monitor_interval": _MONITOR_S,
            "max_restarts": 0,
        }

    def workers(self) -> set[int]:
        """Processes that the agent has started and that have not ended."""
        return _children() - self._others


def _children() -> set[int]:
    """Process ids of the children that the fork server forked."""
    children = multiprocessing.active_children()
    return {child.pid for child in children if isinstance(child, ForkServerProcess) and child.pid is not None}


class Watch:
    """The main thread's view of the ranks."""

    def __init__(self, job: Job, agent: Agent, hub: Hub | None = None) -> None:
        self._job = job
        self._agent = agent
        self._hub = hub
        self._launched_ns = time.monotonic_ns()
        self._killed_at: float | None = None
        self._known: set[int] = set()
        self.elsewhere: Exit | None = None
        self._gone_since: float | None = None
        self.first_gone: Exit | None = None
        self.ending: Ending | None = None
        self.current: Entry | None = None
        self.killed: set[int] = set()

    def look(self) -> None:
        """Record dead ranks, and end the launch where one hangs or has been dead too long."""
        if self._hub is not None:
            self._hub.mirror(self._job)
            self.elsewhere = self.elsewhere or self._hub.first_exit()
        self._free_agent()
        seen = self._positions()
        self.current = self._current(seen)
        if self._gone_since is None:
            here = {rank: at for rank, at in seen.items() if at.pid}
            gone = [rank for rank, at in here.items() if at.stage_name != "done" and not is_alive(at.pid)]
            if gone or self.elsewhere is not None:
                self._gone_since = time.monotonic()
                self.first_gone = self.elsewhere or Exit(gone[0], "exit code 0 before it was done")
        elif time.monotonic() - self._gone_since > _AGENT_GRACE_S:
            self.kill()
        if self.ending is None and self._hub is not None:
            self.ending = _lost_hosts(self._job, self._hub, seen)
            if self.ending is not None:
                self.kill()
        if self.ending is None and self._gone_since is None:
            self.ending = self._hang(seen)
            if self.ending is not None:
                self.kill()

    def _positions(self) -> dict[int, Position]:
        """Positions of the ranks.

        Raises:
            ResultsLost: a rank's heartbeat file was removed.

        """
        seen = positions(self._job)
        missing = self._known - seen.keys()
        if missing:
            path = crumb_path(Path(self._job.out), min(missing))
            message = f"{path}: the heartbeat of rank {min(missing)} was removed or cut while it ran"
            raise ResultsLost(message)
        self._known |= seen.keys()
        return seen

    def _free_agent(self) -> None:
        """Make sure that the agent is notified of the ends of its ranks."""
        resume_helpers()
        if self._killed_at is not None and time.monotonic() - self._killed_at > _STUBBORN_S:
            end_fork_server()

    def _current(self, seen: dict[int, Position]) -> Entry | None:
        """The case of the ranks furthest behind."""
        index = min((at.case_index for at in seen.values()), default=-1)
        return self._job.entries[index] if 0 <= index < len(self._job.entries) else None

    def _hang(self, seen: dict[int, Position]) -> Ending | None:
        if self._hub is None:
            return find_hang(self._job, seen, self._launched_ns)
        hang = find_hang(self._job, seen, self._launched_ns, self._hub.stacks)
        return None if hang is None else _with_hosts(hang, self._hub)

    @property
    def given_up(self) -> bool:
        """Whether to stop waiting for this agent, which still waits for other nodes' agents."""
        over = self._hub is not None and self._killed_at is not None
        return over and time.monotonic() - (self._killed_at or 0.0) > _INTERRUPT_GRACE_S / 2

    def kill(self) -> None:
        """Kill every remaining rank on this node, including those without a heartbeat yet."""
        self._killed_at = self._killed_at or time.monotonic()
        self._free_agent()
        seen = {at.pid: rank for rank, at in positions(self._job).items() if is_alive(at.pid)}
        for pid in seen.keys() | self._agent.workers():
            self.killed |= {seen[pid]} if pid in seen else self._mute()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _mute(self) -> set[int]:
        """The ranks that have left no breadcrumb."""
        return set(range(self._job.num_ranks)) - positions(self._job).keys()
