"""Agent of a launch: starts the ranks of this node and reports their ends."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import socket
import threading
from importlib.util import find_spec
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from typing import Any

from distbench.launcher.helper_processes import resume_helpers
from distbench.launcher.job import Job, NodeLayout
from distbench.launcher.nodes.protocol import BACKEND
from distbench.launcher.postmortem import Exit
from distbench.utils.signals import TERMINAL_SIGNALS
from distbench.utils.text import one_line

# glibc keeps memory freed by a case, up to 64 MiB, for the next one, so that no rank is delayed by page faults. A
# user's own settings stay. Huge pages (glibc.malloc.hugetlb) would cost each launch a second.
RANKS_ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_LOOPBACK = "127.0.0.1"
_WAITING = 1024
_MONITOR_S = 0.1
_MEETING_S = 60


def preload_ranks() -> None:
    """Begin to import torch in the fork server, while this process continues.

    A terminal's Ctrl-C and hang-up reach that process too, but are handled by this one.

    Raises:
        ModuleNotFoundError: torch is not installed.

    """
    if find_spec("torch") is None:
        message = "No module named 'torch'"
        raise ModuleNotFoundError(message, name="torch")
    for name, value in RANKS_ENVIRON.items():
        os.environ.setdefault(name, value)
    multiprocessing.set_forkserver_preload(["distbench.launcher.preload"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)  # again: the call above unblocked SIGINT
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(resume_helpers)  # the interpreter waits for them at exit


def start_rank(job: Job) -> int:
    """Enter a rank's process; everything heavy is loaded there, not in the process that watches."""
    from distbench.launcher.worker import work  # noqa: PLC0415

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

        from distbench.launcher.nodes.rendezvous import register  # noqa: PLC0415

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
            layout = self._job.layout
            if layout is None:
                self.failure = f"{told}; distbench doctor looks at this node's limits"
            else:
                self.first_exit = Exit(layout.node * layout.nproc, told)

    def _settings(self) -> dict[str, Any]:
        """Settings of torchrun. The rendezvous store listens on loopback if all ranks are on one node."""
        layout, store = self._job.layout, self.store
        listener: int | None = None
        run_id = f"distbench-{os.getpid() if layout is None else layout.launch}"
        if layout is None:
            store = socket.create_server((_LOOPBACK, 0), backlog=_WAITING)
            port = store.getsockname()[1]
            layout = NodeLayout(nodes=1, node=0, nproc=self._job.num_ranks, host=_LOOPBACK, port=port, launch=0)
            listener = store.detach()
        elif store is not None:
            listener = os.dup(store.fileno())
        return {
            "min_nodes": layout.nodes,
            "max_nodes": layout.nodes,
            "nproc_per_node": layout.nproc,
            "run_id": run_id,
            "rdzv_backend": BACKEND,
            "rdzv_configs": {"timeout": _MEETING_S, "spread": layout, "listener": listener},
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
