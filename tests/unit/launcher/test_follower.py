"""A node other than node 0: its device locks, and its message to node 0 if they are not free."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from distbench.case.entry import Entry
from distbench.distributed.heartbeat import Position
from distbench.errors import DistbenchError, LaunchFailed, Unsupported
from distbench.launcher import follower, locks, supervisor
from distbench.launcher.agent import Agent
from distbench.launcher.follower import Timeouts, follow
from distbench.launcher.job import Job, NodeLayout
from distbench.launcher.locks import device_lock, hold, is_held
from distbench.launcher.nodes.leader import Leader
from distbench.launcher.nodes.protocol import Beat
from distbench.launcher.supervisor import supervise
from tests.cases import tiny_case


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def layout() -> NodeLayout:
    return NodeLayout(nodes=2, node=0, nproc=1, host="127.0.0.1", port=free_port(), launch=0)


class IdleAgent(Agent):
    """Fake agent that starts no ranks and runs for a second."""

    def run(self) -> None:
        time.sleep(1)


def begin(out: Path, layout: NodeLayout) -> Callable[[], str]:
    """Begin a launch on node 0 in a thread; the returned function yields the reason of its failure."""
    entries = (Entry(name="", case=tiny_case(2), sources={}),)
    job = Job(entries=entries, out=str(out), supervised=True)
    endings: list[str] = []

    def node_0() -> None:
        leader = Leader(layout, 10)
        try:
            supervise(job, lambda *_: None, [], leader)
        except LaunchFailed as error:
            endings.append(str(error))
        finally:
            leader.close(3)

    thread = threading.Thread(target=node_0)
    thread.start()

    def ended() -> str:
        thread.join(20)
        (ending,) = endings
        return ending

    return ended


Devices = Callable[..., tuple[str, ...]]


def in_use(*_: object) -> tuple[str, ...]:
    return ("cuda:0",)


def too_few(*_: object) -> tuple[str, ...]:
    message = "too few devices"
    raise Unsupported(message)


@pytest.mark.parametrize(
    ("devices", "told"), [(in_use, "device cuda:0 is in use by process"), (too_few, "too few devices")]
)
def test_node_without_free_devices_leaves_and_node_0_receives_the_reason(
    tmp_path: Path, layout: NodeLayout, monkeypatch: pytest.MonkeyPatch, devices: Devices, told: str
) -> None:
    monkeypatch.setattr(locks, "DEVICE_LOCKS", tmp_path)
    monkeypatch.setattr(follower, "check_devices", devices)
    monkeypatch.setattr(supervisor, "Agent", IdleAgent)
    ending = begin(tmp_path / "node0", layout)
    mine = msgspec.structs.replace(layout, node=1)
    with hold(None, ("cuda:0",), 0), pytest.raises(DistbenchError, match=told):
        follow(mine, b"", tmp_path / "node1", Timeouts(join_s=10, lock_s=0.0))
    assert f"host {socket.gethostname()} (node 1): {told}" in ending()


def test_age_of_a_position_that_changed_meanwhile_is_not_negative() -> None:
    at = Position(case_index=0, arm=1, stage=4, since_ns=10, pid=7, step=3)
    told = Beat(node=1, nodes=2, nproc=1, host="other", heartbeat={1: follower._aged(at, 5)})  # noqa: SLF001
    assert told.heartbeat[1].since_ns == 0
    assert told.foreign == ""


def test_node_locks_its_devices_from_the_first_launch_on(
    tmp_path: Path, layout: NodeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []

    class LookingAgent(IdleAgent):
        def run(self) -> None:
            held.append(is_held(device_lock("cuda:0")))

    monkeypatch.setattr(locks, "DEVICE_LOCKS", tmp_path)
    monkeypatch.setattr(follower, "check_devices", in_use)
    monkeypatch.setattr(follower, "Agent", LookingAgent)
    monkeypatch.setattr(supervisor, "Agent", IdleAgent)
    ending = begin(tmp_path / "node0", layout)
    mine = msgspec.structs.replace(layout, node=1)
    assert follow(mine, b"", tmp_path / "node1", Timeouts(join_s=10, lock_s=0.0)) == 3
    assert held == [True]
    assert not is_held(device_lock("cuda:0"))
    assert "before any of them had begun" in ending()


def test_node_ended_by_node_0_during_a_launch_exits_with_node_0s_code(
    tmp_path: Path, layout: NodeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EndlessAgent(IdleAgent):
        def run(self) -> None:
            ended.wait(20)

    ended, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(follower, "Agent", EndlessAgent)
    monkeypatch.setattr(follower, "end", lambda *_: ended.wait(20))

    def node_0() -> None:
        leader = Leader(layout, 10)
        leader.begin(
            Job(entries=(Entry(name="", case=tiny_case(2), sources={}),), out=str(tmp_path), supervised=True), []
        )
        begun.wait(20)
        leader.close(75)
        for channel in list(vars(leader)["_channels"].values()):  # as when its process has ended
            channel.close()
        ended.set()  # ranks may take longer to end than node 0 waits

    thread = threading.Thread(target=node_0)
    thread.start()
    monkeypatch.setattr(follower, "clear_ranks", lambda _: begun.set())
    mine = msgspec.structs.replace(layout, node=1)
    assert follow(mine, b"", tmp_path / "node1", Timeouts(join_s=10, lock_s=0.0)) == 75
    thread.join()
