"""Commands that begin in forks of a process that has imported torch, since an import takes most of a short command.

A command is the same program with the same arguments, variables, folder, output and session as one that a user starts.
It differs in what an interpreter reads before it runs a program: PYTHON* variables and sitecustomize have no effect on
it, only on the processes that it starts. Its variables are not in /proc/PID/environ.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

ROOT = Path(__file__).parents[2]

_REQUEST_BYTES = 1 << 20
_ANSWER_BYTES = 64


class Command:
    """A command that runs, or has ended: the part of `subprocess.Popen` that tests use."""

    def __init__(
        self, arguments: Sequence[str], environ: Mapping[str, str], stdout: BinaryIO, stderr: BinaryIO
    ) -> None:
        """Start `python -m`, then `arguments`, in the root folder of the project, in a session of its own."""
        self.args = list(arguments)
        self.returncode: int | None = None
        self._answers, theirs = socket.socketpair()
        request = json.dumps({"arguments": self.args, "environ": dict(environ)}).encode()
        with theirs:
            files = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
            socket.send_fds(_starter(), [request], files)
        self.pid = int(self._read())

    def poll(self) -> int | None:
        """Return the exit code, as `subprocess.Popen` does; None while the command runs."""
        with contextlib.suppress(TimeoutError, BlockingIOError):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; raises TimeoutError after `timeout` seconds."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            self.returncode = int(self._read())
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
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT
        )
        theirs.close()
        atexit.register(process.wait)
        atexit.register(_connection.close)
    return _connection


def _serve(connection: socket.socket) -> None:
    """Start commands until the other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombie is left of a process that reported an exit code
    while True:
        request, files, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 3)
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
    os.setsid()
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), stdout, stderr)):
        os.dup2(file, number)
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(request["environ"])
    _, module, *arguments = request["arguments"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    import distbench.cli.launching
    import distbench.cli.main  # noqa: F401 - what the commands import

    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
