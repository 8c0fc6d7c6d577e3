"""Time limits and ends of ranks, read from their heartbeats."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import msgspec

from distbench.case.entry import Entry
from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Position
from distbench.errors import ResultsLost, Verdict
from distbench.launcher.agent import Agent
from distbench.launcher.hang import find_hang
from distbench.launcher.helper_processes import end_fork_server, resume_helpers
from distbench.launcher.job import Job, heartbeat_path
from distbench.launcher.nodes.leader import Leader
from distbench.launcher.postmortem import Exit, LaunchFailure, positions
from distbench.utils.process import is_alive
from distbench.verify.records import Reason

# Grace period before a dead rank ends the launch; the agent would wait 30 s for a stopped peer.
_AGENT_GRACE_S = 2.0
# Grace period of the agent after a signal; it may be waiting for a rank that has not come up.
INTERRUPT_GRACE_S = 8.0
# An agent still running this long after its ranks were killed receives no notice of their ends.
_STUBBORN_S = 4.0


def first_exit(agent: Agent, watch: Watch) -> Exit | None:
    """The rank that ended first, on its own."""
    first = agent.first_exit
    return watch.first_gone if first is None or first.rank in watch.killed else first


def with_hosts(ending: LaunchFailure, leader: Leader) -> LaunchFailure:
    """`ending` with the host of each blamed rank in its message."""
    reasons = [
        reason
        if reason.rank is None
        else msgspec.structs.replace(
            reason, message=f"{reason.message} (rank {reason.rank} is on host {leader.place(reason.rank)})"
        )
        for reason in ending.reasons
    ]
    return msgspec.structs.replace(ending, reasons=reasons)


def _lost_hosts(job: Job, leader: Leader, seen: dict[int, Position]) -> LaunchFailure | None:
    """The ending where nodes no longer answer; without them no further launch is possible."""
    reasons = []
    here = [at.case_index for at in seen.values() if at.pid]  # other nodes' positions may be older than a case
    for node, host in leader.lost().items():
        ranks = leader.ranks_of(node)
        last = [seen[rank] for rank in ranks if rank in seen]
        place = f"last seen in {min(last, key=lambda at: at.progress).place}" if last else "before its first stage"
        message = f"host {host} (node {node}, rank {ranks[0]} to {ranks[-1]}) is gone or no longer answers, {place}"
        reasons.append(Reason(code="host-lost", rank=ranks[0], message=message))
    if not reasons:
        return None
    index = min(min(here, default=0), len(job.entries) - 1)
    return LaunchFailure(verdict=Verdict.RANK_FAULT, case_index=index, reasons=reasons, last=True)


class Watch:
    """The main thread's view of the ranks."""

    def __init__(self, job: Job, agent: Agent, leader: Leader | None = None) -> None:
        self._job = job
        self._agent = agent
        self._leader = leader
        self._launched_ns = time.monotonic_ns()
        self._killed_at: float | None = None
        self._known: set[int] = set()
        self.elsewhere: Exit | None = None
        self._gone_since: float | None = None
        self.first_gone: Exit | None = None
        self.ending: LaunchFailure | None = None
        self.current: Entry | None = None
        self.slowest: Position | None = None
        self.killed: set[int] = set()

    def look(self) -> None:
        """Record dead ranks, and end the launch where one hangs or has been dead too long."""
        if self._leader is not None:
            self._leader.mirror(self._job)
            self.elsewhere = self.elsewhere or self._leader.first_exit()
        self._free_agent()
        seen = self._positions()
        self.slowest = min(seen.values(), key=lambda at: at.progress, default=None)
        self.current = self._current(seen)
        if self._gone_since is None:
            here = {rank: at for rank, at in seen.items() if at.pid}
            gone = [rank for rank, at in here.items() if at.stage_name != Stage.DONE and not is_alive(at.pid)]
            if gone or self.elsewhere is not None:
                self._gone_since = time.monotonic()
                self.first_gone = self.elsewhere or Exit(gone[0], "exit code 0 before it was done")
        elif time.monotonic() - self._gone_since > _AGENT_GRACE_S:
            self.kill()
        if self.ending is None and self._leader is not None:
            self.ending = _lost_hosts(self._job, self._leader, seen)
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
            path = heartbeat_path(Path(self._job.out), min(missing))
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

    def _hang(self, seen: dict[int, Position]) -> LaunchFailure | None:
        if self._leader is None:
            return find_hang(self._job, seen, self._launched_ns)
        hang = find_hang(self._job, seen, self._launched_ns, self._leader.stacks)
        return None if hang is None else with_hosts(hang, self._leader)

    @property
    def given_up(self) -> bool:
        """Whether to stop waiting for this agent, which still waits for other nodes' agents."""
        over = self._leader is not None and self._killed_at is not None
        return over and time.monotonic() - (self._killed_at or 0.0) > INTERRUPT_GRACE_S / 2

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
        """The ranks that have left no heartbeat."""
        return set(range(self._job.num_ranks)) - positions(self._job).keys()
