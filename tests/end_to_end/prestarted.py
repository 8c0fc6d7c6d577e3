"""Commands that begin in forks of a process that has imported torch, since an import takes most of a short command.

A command is the same program with the same arguments, variables, folder, output and session as one that a user starts.
It differs in what an interpreter reads before it runs a program: PYTHON* variables and sitecustomize have no effect on
it, only on the processes that it starts. Its variables are not in /proc/PID/environ.

The fork server of its ranks, and the ranks that torchrun starts, are forked too, without another import of torch; for
them sitecustomize runs. Instead of the command's variables they have its name in /proc, `Command.name`. With
DISTBENCH_TEST_FRESH_RANKS=1 they are started as for users, as they are by commands in the process of the tests
(`in_process.Run`), of a shell (`launches.FreshBench`) and on hosts (`tests/hosts.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial, partialmethod
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from typing import IO, Any, NoReturn

from distbench.launcher.agent import RANKS_ENVIRON

ROOT = Path(__file__).parents[2]

FRESH_RANKS = "DISTBENCH_TEST_FRESH_RANKS"
SERVER = "s"
"""End of the name of a fork server, and of its ranks: Linux keeps 15 characters of a name."""

_NAME_BYTES = 7
_MOST_FILES = 1024
_REQUEST_BYTES = 1 << 20
_ANSWER_BYTES = 64


class Command:
    """A command that runs, or has ended: the part of `subprocess.Popen` that tests and torchrun use."""

    def __init__(
        self, arguments: Sequence[str], environ: Mapping[str, str], stdout: IO[Any], stderr: IO[Any], name: str = ""
    ) -> None:
        """Start `python`, then `arguments`, in the root folder of the project, in a session of its own.

        A rank of torchrun has the `name` of torchrun's command.
        """
        self.args = list(arguments)
        self.name = name or secrets.token_hex(_NAME_BYTES)
        self.returncode: int | None = None
        self._answers, theirs = socket.socketpair()
        told = {"arguments": self.args, "environ": dict(environ), "name": self.name, "is_rank": bool(name)}
        with theirs:
            files = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
            socket.send_fds(_starter(), [json.dumps(told).encode()], files)
        self.pid = int(self._read())

    def poll(self) -> int | None:
        """Return the exit code, as `subprocess.Popen` does; None while the command runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = int(self._read())
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from error
            self._answers.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self) -> bytes:
        answer = self._answers.recv(_ANSWER_BYTES)
        assert answer, "the process that starts commands is gone"
        return answer


_connection: socket.socket | None = None


def _starter() -> socket.socket:
    """Connection to the process of this one that starts commands."""
    global _connection
    if _connection is None:
        _connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        environ = RANKS_ENVIRON | os.environ  # libraries read these once
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, env=environ)
        theirs.close()
        atexit.register(process.wait)
        atexit.register(_connection.close)
    return _connection


def _serve(connection: socket.socket) -> None:
    """Start commands until the other end is closed, and ranks for those that are torchrun."""
    global _connection
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombie is left of a process that reported an exit code
    ranks, _connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while True:
        asking: socket.socket = select.select([connection, ranks], [], [])[0][0]
        request, files, _, _ = socket.recv_fds(asking, _REQUEST_BYTES, 3)
        if not request:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _report(request, files)
        for file in files:
            os.close(file)


def _report(request: bytes, files: list[int]) -> None:
    """Start a command in a fork, and tell its process id and its exit code; the fork returns."""
    stdout, stderr, answers = files
    pid = os.fork()
    if pid == 0:
        _become(json.loads(request), stdout, stderr)
    os.write(answers, b"%d" % pid)
    _, status = os.waitpid(pid, 0)
    os.write(answers, b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(request: dict[str, Any], stdout: int, stderr: int) -> NoReturn:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler  # noqa: PLC0415

    os.setsid()
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), stdout, stderr)):
        os.dup2(file, number)
    _close_all_but(_starter().fileno())
    os.environ.clear()
    os.environ.update(request["environ"])
    name = request["name"]
    Path("/proc/self/comm").write_text(name)
    if request["is_rank"]:
        _customize()
    elif FRESH_RANKS not in os.environ:
        util.spawnv_passfds = partial(_start_helper, util.spawnv_passfds, name)
        SubprocessHandler._popen = partialmethod(_start_rank, name=name)  # type: ignore[assignment, method-assign] # noqa: SLF001
    arguments = request["arguments"]
    if arguments[0] == "-u":
        arguments.pop(0)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    _, module, *sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def _start_rank(_: object, command: tuple[str, ...], environ: dict[str, str], name: str) -> Command:
    """Start a rank of torchrun, whose command begins with the interpreter."""
    return Command(command[1:], environ, sys.stdout, sys.stderr, name)


def _start_helper(execute: Callable[..., int], name: str, path: str, arguments: list[str], files: Sequence[int]) -> int:
    """Start a helper process of multiprocessing, a fork server in a fork of this process; return its process id."""
    program = arguments[-1]
    if "multiprocessing.forkserver" not in program:
        return execute(path, arguments, files)
    pid = os.fork()
    if pid == 0:
        try:
            Path("/proc/self/comm").write_text(name + SERVER)
            _as_executed(files)
            exec(program, {"__name__": "__main__"})  # noqa: S102 - multiprocessing's own line
        except Exception:  # noqa: BLE001 - as an interpreter ends
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


def _as_executed(files: Sequence[int]) -> None:
    """Leave this process the files and signal handlers that a new program has, and let its sitecustomize run."""
    _close_all_but(*files)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    _customize()


def _close_all_but(*files: int) -> None:
    """Close all files of this process but `files` and the standard ones."""
    kept = sorted({2, *files})
    for low, high in zip(kept, [*kept[1:], _MOST_FILES], strict=True):
        os.closerange(low + 1, high)


def _customize() -> None:
    """Do for PYTHONPATH and sitecustomize what an interpreter does at its start."""
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    with contextlib.suppress(ModuleNotFoundError):
        import_module("sitecustomize")


if __name__ == "__main__":
    import torch.distributed.launcher.api  # noqa: F401 - see below

    import distbench.cli.launching
    import distbench.cli.main
    import distbench.launcher.worker  # noqa: F401 - what the commands and their ranks import

    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
