"""Runs of a suite on groups of nodes, those of a round at the same time, and their endings."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from distbench.errors import DistbenchError, InvalidCase, Verdict
from distbench.launcher.job import NodeLayout
from distbench.report.journal import JournalReader
from distbench.report.progress import Meter
from distbench.report.results import Result, Results
from distbench.tools.cluster.attribution import GroupRun
from distbench.tools.cluster.plan import Group, Round, Step
from distbench.tools.cluster.processes import Processes
from distbench.tools.cluster.shared_folder import unshared
from distbench.utils.signals import Interrupted

_POLL_S = 0.1
_LOOK_S = 2.0
_SHOWN_GROUPS = 4
_PROBE_S = 120.0
# Grace period of a group's other processes after the first failure: they may have the group's verdict to write.
_PARTING_S = 30.0
_SECRET_BYTES = 32


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a trial: suite and options, ranks per node, folder for results, time limit in seconds.

    `launcher` is as command_on takes it; where it is empty all nodes are this machine, and `port` and the following
    ones are used, one for each group of a round. `endpoint_host` replaces the first node's name as the rendezvous.
    `join_timeout_s` is the time for a group's nodes to join.
    """

    suite: str
    options: tuple[str, ...]
    nproc: int
    out: Path
    timeout_s: float
    join_timeout_s: float
    launcher: tuple[str, ...]
    port: int
    endpoint_host: str = ""


def check_shared(settings: Settings, nodes: Group, signals: Sequence[int]) -> None:
    """Refuse a folder for results that some nodes do not share, which would make them look broken.

    Raises:
        InvalidCase: names those nodes.
        Interrupted: by one of `signals`.

    """

    def run(folder: Path, commands: Mapping[str, Sequence[str]]) -> None:
        with contextlib.ExitStack() as stack:
            processes = Processes(settings.launcher, folder)
            stack.callback(processes.end)
            processes.start(commands)
            deadline = time.monotonic() + _PROBE_S
            while None in processes.codes.values() and time.monotonic() < deadline:
                _heed(signals)
                time.sleep(_POLL_S)

    found = unshared(settings.out, nodes, run)
    if found:
        told = "; ".join(f"{node}: {said}" for node, said in found.items())
        message = f"--out {settings.out}: not the same folder on all nodes ({told:.400}); give one that they share"
        raise InvalidCase(message)


def run_round(settings: Settings, step: Step, groups: Round, signals: Sequence[int], meter: Meter) -> list[GroupRun]:
    """Run the groups of a round at the same time and return their trials; `meter` counts their cases.

    Raises:
        Interrupted: by one of `signals`; nothing is left running.

    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(_Running(settings, step, nodes, settings.port + number))
            for number, nodes in enumerate(groups)
        ]
        try:
            deadline, looked = time.monotonic() + settings.timeout_s, 0.0
            while (alive := [one for one in running if one.alive()]) and time.monotonic() < deadline:
                _heed(signals)
                if time.monotonic() - looked > _LOOK_S:
                    looked = time.monotonic()
                    meter.done = sum(one.count() for one in running)
                    meter.now = ", ".join(one.name for one in alive[:_SHOWN_GROUPS])
                time.sleep(_POLL_S)
        finally:
            for one in running:
                one.let_go()
        return [one.trial() for one in running]


def _heed(signals: Sequence[int]) -> None:
    if signals:
        raise Interrupted(signals[0])


class _Running:
    """The processes of one group, one per node; when the context ends none is left."""

    def __init__(self, settings: Settings, step: Step, nodes: Group, port: int) -> None:
        self._settings, self._step, self._nodes, self._port = settings, step, nodes, port
        self.out = settings.out / "trials" / step / ("all" if step == "all" else "+".join(nodes))
        self._secret = self.out / "secret"  # the nodes share this folder, and their commands can be seen by all
        self._processes = Processes(settings.launcher, self.out)
        self._failed_at: float | None = None
        self._late = False
        self._journal, self._done = JournalReader(self.out), 0
        self._started = time.monotonic()
        self._wall_s = 0.0

    def __enter__(self) -> _Running:  # noqa: PYI034 - Self comes with Python 3.11
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        (self.out / "nodes.txt").write_text("".join(f"{node}\n" for node in self._nodes))
        self._secret.touch(mode=0o600)
        self._secret.write_text(secrets.token_hex(_SECRET_BYTES))
        try:
            self._processes.start({node: self._command(number) for number, node in enumerate(self._nodes)})
        except BaseException:
            self._processes.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.end()
        self._secret.unlink(missing_ok=True)

    def alive(self) -> bool:
        """Whether a process of the group is running; after one has failed the others are ended with a delay."""
        codes = self._processes.codes.values()
        if None not in codes:
            self._wall_s = self._wall_s or time.monotonic() - self._started
            return False
        if any(codes):
            now = time.monotonic()
            self._failed_at = self._failed_at or now
            if now - self._failed_at > _PARTING_S:
                self._processes.end()
                return False
        return True

    @property
    def name(self) -> str:
        """The nodes of the group."""
        return "+".join(self._nodes)

    def count(self) -> int:
        """Number of its results on disk."""
        with contextlib.suppress(DistbenchError):  # a result is being replaced
            self._done += sum(1 for _ in self._journal.new_lines())
        return self._done

    def let_go(self) -> None:
        """Make the remaining processes end by themselves; a group that has not failed is then late."""
        self._late = self.alive() and self._failed_at is None
        self._processes.let_go()

    def trial(self) -> GroupRun:
        """End the remaining processes, and return the group's trial."""
        self._processes.end()
        if self._late:
            return self._failed(Verdict.HANG, f"no end within {self._settings.timeout_s:g} s{self._last_words()}")
        try:
            results = Results(self.out)
            found, exit_code = list(results), results.exit_code
        except InvalidCase as error:
            return self._failed(Verdict.RANK_FAULT, f"{error}{self._last_words()}")
        unexpected = next((result for result in found if not result.as_expected), None)
        if unexpected is not None:
            message = unexpected.reasons[0].message if unexpected.reasons else f"expected {unexpected.expect}"
            return self._ended(exit_code, unexpected.verdict.value, f"{unexpected.name}: {message}", found)
        if exit_code or any(self._processes.codes.values()) or not found:
            return self._failed(Verdict.RANK_FAULT, f"{len(found)} cases ended as expected{self._last_words()}")
        return msgspec.structs.replace(self._ended(0, Verdict.PASS.value, "", found), times=_times(found))

    def _last_words(self) -> str:
        """Exit codes of the nodes that failed, each with the last line of its output."""
        failed = {node: code for node, code in self._processes.codes.items() if code}
        told = (f"{node} exited with {code}: {self._processes.last_line(node)}" for node, code in failed.items())
        return "".join(f"; {one.rstrip(': ')}" for one in told)

    def _failed(self, verdict: Verdict, reason: str) -> GroupRun:
        return self._ended(verdict.exit_code, verdict.value, reason)

    def _ended(self, exit_code: int, verdict: str, reason: str, found: Sequence[Result] = ()) -> GroupRun:
        return GroupRun(
            step=self._step,
            nodes=self._nodes,
            exit_code=exit_code,
            verdict=verdict,
            reason=reason,
            wall_s=self._wall_s or time.monotonic() - self._started,
            devices=_kinds_of_device(found),
        )

    def _command(self, number: int) -> list[str]:
        """The suite's command on the group's node `number`."""
        settings = self._settings
        suite = ["suite", settings.suite, "--out", str(self.out), *settings.options, "--quiet", "--for", "none"]
        command = [sys.executable, "-m", "distbench", "--end-with-stdin", *suite, "--nproc", str(settings.nproc)]
        if len(self._nodes) == 1:
            return [*command, "--nnodes", "1"]  # in a job of several nodes too
        layout = NodeLayout(
            nodes=len(self._nodes),
            node=number,
            nproc=settings.nproc,
            host=settings.endpoint_host or self._nodes[0],
            port=self._port,
            launch=0,
        )
        place = ["--nnodes", str(layout.nodes), "--node-rank", str(number), "--rdzv-endpoint", layout.endpoint]
        place += ["--secret-file", str(self._secret)]
        return [*command, *place, "--join-timeout", f"{settings.join_timeout_s:g}"]


def _kinds_of_device(results: Sequence[Result]) -> tuple[str, ...]:
    return tuple(sorted({rank.device.partition(":")[0] for result in results for rank in result.ranks}))


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
