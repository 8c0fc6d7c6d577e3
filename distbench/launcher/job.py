"""The input of a launch's ranks, and the files that they leave when they cannot report."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from distbench.case.entry import Entry
from distbench.case.spec import FIELD_DEFAULTS
from distbench.case.stages import STAGES, Stage
from distbench.case.timeouts import compiles, stage_limit
from distbench.distributed.heartbeat import Position
from distbench.launcher.time_budget import Deadline


class NodeLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A launch over several nodes: `nproc` ranks on each of `nodes`, this one is `node`.

    Node n has ranks n * nproc to (n + 1) * nproc - 1, so rank 0 is on node 0. `host` and `port` are the agents'
    rendezvous, and `launch` counts the launches of a campaign.
    """

    nodes: int
    node: int
    nproc: int
    host: str
    port: int
    launch: int

    @property
    def endpoint(self) -> str:
        """Host and port as one word; an IPv6 address stands in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's input at its start: the cases in order, and the folder for their results.

    `report_paths` also take the last report whole, as one document. `bundle` is the folder for bundles of failing
    cases, or empty for none. `supervised`: a parent watches, prints and decides the exit code. `stays`: the parent will
    have another job for the same ranks. `spread` is None on one node. `started` is the number of ranks that torchrun
    started; 0 where the launch has `num_ranks` of them. `quiet` ranks of torchrun print no case. Cases that cannot end
    by the `deadline` are left out, as estimated by `pace` from the times of earlier cases (time_budget.Pace).
    """

    entries: tuple[Entry, ...]
    out: str
    report_paths: tuple[str, ...] = ()
    bundle: str = ""
    supervised: bool
    stays: bool = False
    layout: NodeLayout | None = None
    started: int = 0
    quiet: bool = False
    deadline: Deadline | None = None
    pace: dict[int, float] = {}

    @property
    def accelerated(self) -> bool:
        """Whether any case may take devices."""
        return any(entry.case.device != "cpu" for entry in self.entries if not entry.refused)

    @property
    def shares_devices(self) -> bool:
        """Whether the ranks of any case may share devices."""
        return any(entry.case.share_devices for entry in self.entries if not entry.refused)

    @property
    def longest_stage_s(self) -> float:
        """Longest time limit of a stage of any case, in seconds."""
        limits = (
            stage_limit(entry.case, stage)
            for entry in self.entries
            for stage in STAGES
            if not entry.refused and (stage != Stage.COMPILE or compiles(entry.case))
        )
        return max(limits, default=float(FIELD_DEFAULTS["timeout"]))

    @property
    def num_ranks(self) -> int:
        """Ranks that the largest case needs; over several nodes, or under torchrun, all ranks."""
        if self.started:
            return self.started
        if self.layout is not None:
            return self.layout.nodes * self.layout.nproc
        return max(entry.case.ep_size for entry in self.entries)

    def failed(self, exit_code: int, *, as_expected: bool) -> bool:
        """Whether a case of this job failed: with a wrong result and, in a suite, an unexpected one."""
        return exit_code != 0 and (bool(self.report_paths) or not as_expected)


class RankFailure(msgspec.Struct, frozen=True, kw_only=True):
    """An exception that ended a rank.

    `echo`: it only lost a peer that had failed before. `timeout`: it waited for a peer too long. `disk_full`: it could
    not write for lack of space. `results_lost`: it could not write its results for another reason.
    """

    rank: int
    exception: str
    message: str
    position: Position
    traceback: str
    echo: bool
    timeout: bool
    disk_full: bool = False
    results_lost: bool = False

    def __str__(self) -> str:
        """One line: rank, exception, arm, stage, message."""
        return f"rank {self.rank} raised {self.exception} in {self.position.place}: {self.message}"


class Machine(msgspec.Struct, frozen=True):
    """Location of a rank: its host, and the device that it takes for a case that does not request the CPU."""

    host: str
    device: str


def ranks_folder(out: Path) -> Path:
    """Folder of the files below."""
    return out / "ranks"


def clear_ranks(out: Path) -> None:
    """Make an empty folder for the files of a launch's ranks."""
    shutil.rmtree(ranks_folder(out), ignore_errors=True)
    ranks_folder(out).mkdir(parents=True, exist_ok=True)


def job_path(out: Path) -> Path:
    """File of the job itself, for a later `collect`."""
    return ranks_folder(out) / "job.json"


def next_job_path(out: Path, number: int) -> Path:
    """File by which ranks that stay up receive their next job, the first being number 1."""
    return ranks_folder(out) / f"next-{number:05d}.json"


def done_path(out: Path, number: int) -> Path:
    """File that marks a job as ended on all ranks; 0 is the job that they began with."""
    return ranks_folder(out) / f"done-{number:05d}"


def heartbeat_path(out: Path, rank: int) -> Path:
    """Heartbeat file of a rank."""
    return ranks_folder(out) / f"rank-{rank:05d}.heartbeat"


def machine_path(out: Path, rank: int) -> Path:
    """File of a rank's location (`Machine`)."""
    return ranks_folder(out) / f"rank-{rank:05d}.machine.json"


def failure_path(out: Path, rank: int) -> Path:
    """File of the exception that ended a rank (`RankFailure`)."""
    return ranks_folder(out) / f"rank-{rank:05d}.failure.json"


def stack_path(out: Path, rank: int) -> Path:
    """File into which a rank writes its Python stacks on request."""
    return ranks_folder(out) / f"rank-{rank:05d}.stacks"
