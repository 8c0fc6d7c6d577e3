"""A running command as the process that a user starts, its results, and its remaining processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from tests.end_to_end.prestarted import SERVER, Command

ROOT = Path(__file__).parents[2]
SOAK = os.environ.get("DISTBENCH_SOAK") == "1"
TINY = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "tokens": 3}

_COMPUTED_S = 0.2
_MEASURED = 0.01
_TOLD = 6000
_TOLD_REPORTS = 3
_MARKER = "DISTBENCH_TEST_MARKER"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - others write there


def write_suite(path: Path, seeds: Iterable[int], *, expect: object = (), **defaults: object) -> Path:
    """Write a suite of one tiny case for each seed, named seed=0, seed=1, …"""
    path.write_text(json.dumps({"defaults": TINY | defaults, "axes": {"seed": list(seeds)}, "expect": expect}))
    return path


def faulty(*faults: str, once: Path | None = None) -> dict[str, str]:
    """Variables that make ranks fail, in the syntax of tests/faulty_site/sitecustomize.py."""
    variables = {"PYTHONPATH": f"{ROOT}/tests/faulty_site:{ROOT}", "DISTBENCH_TEST_FAULT": ",".join(faults)}
    return variables | ({"DISTBENCH_TEST_FAULT_ONCE": str(once)} if once else {})


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for `condition`; return whether it became true within `seconds`, or longer on a machine that others use."""
    began, factor = time.monotonic(), 1.0
    while not condition():
        if time.monotonic() - began > seconds * factor:
            if factor > 1:
                return False
            factor = slowed() + _MEASURED
        time.sleep(0.02)
    return True


def slowed() -> float:
    """How many times longer than alone a computation takes here now, at least 1: others use the machine."""
    began, used = time.monotonic(), time.process_time()
    while time.process_time() - used < _COMPUTED_S:
        pass
    return max(1.0, (time.monotonic() - began) / _COMPUTED_S)


def run_python(code: str, **environ: str) -> bytes:
    """Run `code` in a new interpreter; return its standard output."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, env=os.environ | environ, cwd=ROOT, check=True).stdout


class Outcome:
    """Results in the folder of a command."""

    def __init__(self, out: Path) -> None:
        self.out = out

    @property
    def report(self) -> dict[str, Any]:
        """Report of `run`, or empty."""
        path = self.out / "report.json"
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return content

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The whole lines of results.jsonl."""
        path = self.out / "results.jsonl"
        content = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]

    @property
    def verdicts(self) -> dict[str, str]:
        """Verdicts by case; a case with two results fails the test."""
        reports = self.reports
        found = {report["name"]: report["verdict"] for report in reports}
        assert len(found) == len(reports)
        return found

    @property
    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return content


class Bench(Outcome):
    """A distbench command in its own session; leaving the context kills all of its processes."""

    starter: tuple[str, ...] = ("-m", "distbench")

    def __init__(self, out: Path, *arguments: str | Path, **environ: str) -> None:
        super().__init__(out)
        self._marker = uuid.uuid4().hex
        self._logs = [out.with_name(f"{out.name}.{self._marker[:8]}.{name}") for name in ("stdout", "stderr")]
        command = [*self.starter, *map(str, arguments), "--out", str(out)]
        with self._logs[0].open("wb") as stdout, self._logs[1].open("wb") as stderr:
            self.process = self._started(command, os.environ | {_MARKER: self._marker} | environ, stdout, stderr)

    def _started(
        self, command: list[str], environ: dict[str, str], stdout: BinaryIO, stderr: BinaryIO
    ) -> Command | subprocess.Popen[bytes]:
        return Command(command, environ, stdout, stderr)

    def __enter__(self) -> Bench:  # noqa: PYI034 - Self comes with Python 3.11
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.tell()
        self.end_at_once()

    def tell(self) -> None:
        """Print what a test that fails has to be understood by: what the command said, and what its reports blame."""
        told = [f"exit code {self.process.poll()} of {self.process.args!r}"]
        for name, path in zip(("stdout", "stderr"), self._logs, strict=True):
            told.append(f"--- {name}\n{path.read_text(errors='replace')[-_TOLD:]}")
        found = sorted(self.out.glob("**/report.json"))
        for report in [json.loads(path.read_text()) for path in found] or self.reports[-_TOLD_REPORTS:]:
            blamed = {key: report.get(key) for key in ("name", "verdict", "reasons", "diagnosis", "stacks")}
            told.append(f"--- report\n{json.dumps(blamed, indent=1)[-_TOLD:]}")
        sys.stdout.write("\n".join(told) + "\n")

    def finish(self, seconds: float = 100) -> int:
        """Wait for the exit code."""
        wait_until(lambda: self.process.poll() is not None, seconds)
        return self.process.wait(0)

    @property
    def stdout(self) -> str:
        return self._logs[0].read_text()

    @property
    def stderr(self) -> str:
        return self._logs[1].read_text()

    def end_at_once(self) -> None:
        """Stop, then kill all processes, so that none sees another one end."""
        seen: set[int] = set()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.left():
                seen.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.process.wait()
        assert wait_until(self.gone, 30)
        assert wait_until(lambda: all(_has_ended(pid) for pid in seen), 30)

    def left(self) -> list[int]:
        """Living processes started by this bench, directly or indirectly."""
        marker = f"{_MARKER}={self._marker}".encode()
        found = {int(path.name) for path in Path("/proc").glob("[0-9]*") if marker in _environ(path)}
        found.update(self._forks())
        return sorted(found if self.process.poll() is not None else found | {self.process.pid})

    def fork_servers(self) -> list[int]:
        """The fork server, once the command has forked it; else nothing."""
        forks = self._forks().items()
        return [pid for pid, (name, parent) in forks if name.endswith(SERVER) and parent == self.process.pid]

    def _forks(self) -> dict[int, tuple[str, int]]:
        """Names and parents of the living forks of the command, whose names begin with its own, by process id."""
        found: dict[int, tuple[str, int]] = {}
        if not isinstance(self.process, Command):
            return found
        for path in Path("/proc").glob("[0-9]*"):
            name, _, values = _text(path / "stat").partition("(")[2].rpartition(")")
            if name.startswith(self.process.name):
                state, parent, *_ = values.split()
                found |= {int(path.name): (name, int(parent))} if state != "Z" else {}
        return found

    def gone(self) -> bool:
        """Return whether no process is left."""
        return not self.left()


class FreshBench(Bench):
    """The same in a new interpreter, as a shell starts it, with the signals ignored that this process ignores."""

    def _started(
        self, command: list[str], environ: dict[str, str], stdout: BinaryIO, stderr: BinaryIO
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environ,
            cwd=ROOT,
            start_new_session=True,
        )


class Torchrun(Bench):
    """A distbench command under plain torchrun, as two ranks."""

    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *Bench.starter)


class TorchrunOfThree(Torchrun):
    """The same as three ranks."""

    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", *Bench.starter)


def shared_memory() -> set[Path]:
    """Shared memory segments that no process has mapped."""
    there = {Path(entry.path): entry.inode() for entry in os.scandir(_SHARED_MEMORY)}
    lines = [line for path in Path("/proc").glob("[0-9]*/maps") for line in _text(path).splitlines()]
    mapped = {int(line.split()[4]) for line in lines if str(_SHARED_MEMORY) in line}
    return {path for path, inode in there.items() if inode not in mapped and path.exists()}


def command_line(pid: int) -> str:
    """Program and arguments of a process, each ended by NUL; empty where it has ended."""
    return _text(Path(f"/proc/{pid}/cmdline"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _has_ended(pid: int) -> bool:
    """Whether a process has closed its files, and so left its locks.

    It loses its variables a moment before, and its first thread may end before the others.
    """
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return True
    state = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1]
    return len(threads) <= 1 and state in ([], ["Z"], ["X"])


def _environ(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()  # empty for a zombie
    except OSError:
        return b""
