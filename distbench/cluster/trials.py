"""Runs a suite on groups of nodes, a round's groups at the same time, and reads how each ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from distbench.cluster.faults import Trial
from distbench.cluster.launchers import command_on
from distbench.cluster.plan import Group, Round, Step
from distbench.collect import collect
from distbench.errors import DistbenchError, InvalidCase, Verdict
from distbench.report.results import Result, Results
from distbench.signals import Interrupted

_POLL_S = 0.1
# A suite that is told to end kills its ranks first.
_GRACE_S = 15.0
# Once a process of a group has failed the others have so long to end: they may have the group's verdict to write.
_PARTING_S = 30.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How a trial is started: the suite and its options, ranks on each node, where results go, seconds it may take.

    `launcher` is what command_on takes; where it is empty all nodes are this machine, and `port` and those after it
    are used, one for each group of a round. `endpoint_host` replaces the first node's name as the meeting point.
    """

    suite: str
    options: tuple[str, ...]
    nproc: int
    out: Path
    timeout_s: float
    launcher: tuple[str, ...]
    port: int
    endpoint_host: str = ""


def run_round(settings: Settings, step: Step, groups: Round, signals: Sequence[int]) -> list[Trial]:
    """Run the groups of a round at the same time and return their trials.

    Raises:
        Interrupted: by one of `signals`; nothing is left running on this machine.

    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(_Running(settings, step, nodes, settings.port + number))
            for number, nodes in enumerate(groups)
        ]
        deadline = time.monotonic() + settings.timeout_s
        while any(one.alive() for one in running) and time.monotonic() < deadline:
            if signals:
                raise Interrupted(signals[0])
            time.sleep(_POLL_S)
        return [one.trial() for one in running]


class _Running:
    """The processes of one group, one for each of its nodes; on leaving the context none is left."""

    def __init__(self, settings: Settings, step: Step, nodes: Group, port: int) -> None:
        self._settings, self._step, self._nodes, self._port = settings, step, nodes, port
        self.out = settings.out / "trials" / step / ("all" if step == "all" else "+".join(nodes))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failed_at: float | None = None

    def __enter__(self) -> _Running:  # noqa: PYI034 - Self comes with Python 3.11
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        (self.out / "nodes.txt").write_text("".join(f"{node}\n" for node in self._nodes))
        for number, node in enumerate(self._nodes):
            command = command_on(self._settings.launcher, node, self._command(number))
            with (self.out / f"{node}.log").open("wb") as log:
                self._processes.append(_start(command, log.fileno()))
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def alive(self) -> bool:
        """Whether a process of the group is running; the others are ended a while after one has failed."""
        codes = [process.poll() for process in self._processes]
        if None not in codes:
            return False
        if any(codes):
            now = time.monotonic()
            self._failed_at = self._failed_at or now
            if now - self._failed_at > _PARTING_S:
                self._end()
                return False
        return True

    def trial(self) -> Trial:
        """End what still runs, and say how the group did."""
        late = self.alive() and self._failed_at is None
        self._end()
        if late:
            return self._failed(Verdict.HANG, f"no end within {self._settings.timeout_s:g} s")
        codes = {node: process.returncode for node, process in zip(self._nodes, self._processes, strict=True)}
        if any(codes.values()) and len(self._nodes) > 1:
            with contextlib.suppress(DistbenchError):
                collect(self.out)
        try:
            results = Results(self.out)
            found, exit_code = list(results), results.exit_code
        except InvalidCase as error:
            return self._failed(Verdict.RANK_FAULT, f"{error}; {_exits(codes)}")
        unexpected = next((result for result in found if not result.as_expected), None)
        if unexpected is not None:
            message = unexpected.reasons[0].message if unexpected.reasons else f"expected {unexpected.expect}"
            return self._ended(exit_code, unexpected.verdict, f"{unexpected.name}: {message}")
        if exit_code or any(codes.values()) or not found:
            return self._failed(Verdict.RANK_FAULT, f"{len(found)} cases ended as expected; {_exits(codes)}")
        return Trial(step=self._step, nodes=self._nodes, exit_code=0, verdict="PASS", times=_times(found))

    def _failed(self, verdict: Verdict, reason: str) -> Trial:
        return self._ended(verdict.exit_code, verdict, reason)

    def _ended(self, exit_code: int, verdict: Verdict, reason: str) -> Trial:
        return Trial(step=self._step, nodes=self._nodes, exit_code=exit_code, verdict=verdict.value, reason=reason)

    def _command(self, number: int) -> list[str]:
        """Return the suite's command on the group's node `number`: supervised on one node, under torchrun on more."""
        settings = self._settings
        suite = ["-m", "distbench", "suite", settings.suite, "--out", str(self.out), *settings.options]
        if len(self._nodes) == 1:
            return [sys.executable, *suite, "--quiet", "--nproc", str(settings.nproc)]
        meeting = [
            f"--nnodes={len(self._nodes)}",
            f"--nproc-per-node={settings.nproc}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={settings.endpoint_host or self._nodes[0]}:{self._port}",
            f"--rdzv-id={'+'.join((self._step, str(self._port)))}",
            f"--rdzv-conf=is_host={int(number == 0)}",
        ]
        return [sys.executable, "-m", "torch.distributed.run", *meeting, *suite]

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(command: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - the user's own launcher, and no shell
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        message = f"launcher {command[0]!r}: {error.strerror}; name one that is installed here"
        raise InvalidCase(message) from error


def _exits(codes: dict[str, int]) -> str:
    return ", ".join(f"{node} exited with {code}" for node, code in codes.items())


def _times(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    times: dict[str, dict[str, float]] = {}
    for result in results:
        for arm, stage, median_us in _medians(result):
            if median_us > 0:
                times.setdefault(stage, {})[f"{result.name}/{arm}"] = median_us
    return times


def _medians(result: Result) -> Iterator[tuple[str, str, float]]:
    for one in result.stage_times():
        yield one.arm, one.stage, one.median_us
