"""A command run to its end in this process: what it said, its exit code and its results.

Commands of one process share its torch and its fork server, whose imports are most of the cost of a tiny case. What a
test says about the process of a command itself, as its signals, needs `launches.Bench`. So do variables of a command,
since ranks have those of their fork server: such a command runs in a process of its own.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from pathlib import Path

from distbench.cli.main import main
from distbench.launcher.helper_processes import end_fork_server
from tests.end_to_end.launches import ROOT, Bench, Outcome

_OF_THIS_TEST = "PYTEST_CURRENT_TEST"
_started: tuple[int | None, dict[str, str]] = (None, {})


class Run(Outcome):
    """A finished command."""

    def __init__(self, out: Path, *arguments: str | Path, **environ: str) -> None:
        super().__init__(out)
        start = time.monotonic()
        self.exit_code, self.stdout, self.stderr = _alone(out, arguments, environ) if environ else _here(out, arguments)
        self.seconds = time.monotonic() - start

    @property
    def last_line(self) -> str:
        return self.stdout.rstrip("\n").splitlines()[-1]


def tiny(out: Path, nproc: int, *arguments: str, **environ: str) -> Run:
    """Run one case of the tiny layer."""
    return Run(out, "run", "--nproc", str(nproc), "--model", "tiny", *arguments, **environ)


def _alone(out: Path, arguments: Sequence[str | Path], environ: Mapping[str, str]) -> tuple[int, str, str]:
    with Bench(out, *arguments, **environ) as bench:
        return bench.finish(), bench.stdout, bench.stderr


def _here(out: Path, arguments: Sequence[str | Path]) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with _place(), redirect_stdout(stdout), redirect_stderr(stderr):
        exit_code = main([*map(str, arguments), "--out", str(out)])
    return exit_code, stdout.getvalue(), stderr.getvalue()


@contextmanager
def _place() -> Iterator[None]:
    """Run in the folder of a command; ranks are forked by a server that has the variables of this process."""
    global _started  # noqa: PLW0603 - there is one fork server in a process
    folder, before = Path.cwd(), dict(os.environ)
    given = {name: value for name, value in os.environ.items() if name != _OF_THIS_TEST}
    if _started != (_server(), given):
        _end_server()
    os.chdir(ROOT)
    try:
        yield
    finally:
        _started = (_server(), given)
        os.chdir(folder)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _end_server() -> None:
    """End the fork server; the next launch starts one, and looks for the end of this one first."""
    pid = _server()
    end_fork_server()
    if pid is not None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _server() -> int | None:
    pid: int | None = getattr(vars(forkserver)["_forkserver"], "_forkserver_pid", None)
    return pid
