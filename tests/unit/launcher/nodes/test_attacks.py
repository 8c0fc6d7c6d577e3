"""Node 0 under attack over loopback: messages of strangers cost no memory, change no verdict, and are logged.

DISTBENCH_SOAK=1 sends 50,000 messages instead of a few hundred.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distbench.distributed.heartbeat import Position
from distbench.errors import InvalidCase
from distbench.launcher.job import Machine, NodeLayout, RankFailure
from distbench.launcher.nodes import gate
from distbench.launcher.nodes.client import Client, NodeLost
from distbench.launcher.nodes.leader import Leader
from distbench.launcher.nodes.proof import (
    ANSWER_BYTES,
    CHALLENGE_BYTES,
    Channel,
    Tampered,
    challenge,
    check_answer,
    prove,
)
from distbench.launcher.nodes.protocol import Beat, Phase
from distbench.launcher.nodes.refusals import Refusals
from distbench.launcher.postmortem import Exit
from tests.attacks import KINDS, LOOPBACK, attack
from tests.end_to_end.launches import ROOT, SOAK, Bench, slowed, wait_until, write_suite

SECRET = b"what all nodes of this launch know"
MOST_GROWTH = 1 << 20
MESSAGES = 50_000 if SOAK else 600
WARM_UP = 400


class Meeting(NamedTuple):
    leader: Leader
    layout: NodeLayout
    log: Path

    def refusals(self, count: int = 1) -> list[str]:
        """Wait until there are `count` refusals; return the reason of each."""
        wait_until(lambda: len(self._refusals()) >= count, 5)
        return self._refusals()

    def _refusals(self) -> list[str]:
        return [line.partition(": ")[2] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def connect(self) -> socket.socket:
        return socket.create_connection((LOOPBACK, self.layout.port), timeout=5)


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    monkeypatch.setattr("distbench.launcher.nodes.leader._TOLD_S", 0.0)
    monkeypatch.setattr("distbench.launcher.nodes.leader.BEAT_S", 0.0)
    layout = NodeLayout(nodes=3, node=0, nproc=2, host=LOOPBACK, port=free_port(), launch=0)
    leader = Leader(layout, 1.0, SECRET, tmp_path / "refused.log")
    yield Meeting(leader, layout, tmp_path / "refused.log")
    leader.close(0)


def beat(node: int = 1, **told: Any) -> Beat:
    fields: dict[str, Any] = {"node": node, "nodes": 3, "nproc": 2, "host": "other"}
    return Beat(**fields | told)


def position(**told: int) -> Position:
    return Position(**{"case_index": 0, "arm": 1, "stage": 4, "since_ns": 5, "pid": 0, "step": 3} | told)


@pytest.mark.timeout(1200)
def test_unauthenticated_peers_cost_no_memory_and_block_no_node(tmp_path: Path) -> None:
    secret = secrets.token_hex(16)
    log = tmp_path / "refused.log"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.leader_process", str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"DISTBENCH_SECRET": secret, "PATH": ""},
    ) as node_0:
        assert node_0.stdin is not None
        assert node_0.stdout is not None

        def ask() -> list[str]:
            assert node_0.stdin is not None
            assert node_0.stdout is not None
            node_0.stdin.write("\n")
            node_0.stdin.flush()
            return node_0.stdout.readline().split()

        port = int(node_0.stdout.readline())
        layout = NodeLayout(nodes=2, node=1, nproc=1, host=LOOPBACK, port=port, launch=0)
        client = Client(layout, secret.encode(), 10.0, [])
        told = Beat(node=1, nodes=2, nproc=1, host="other")
        waits: list[float] = []
        done = threading.Event()

        def tell() -> None:
            while not done.wait(0.1):
                begun = time.monotonic()
                assert client.tell(told).phase is Phase.WAIT
                waits.append(time.monotonic() - begun)

        teller = threading.Thread(target=tell)
        teller.start()
        attack(port, WARM_UP, seed=1)
        before = int(ask()[0])
        began = time.monotonic()
        sent = WARM_UP + attack(port, MESSAGES, recorded=recorded_proof(secret.encode()))
        took = time.monotonic() - began
        after, lost, refused = ask()
        assert wait_until(lambda: log.read_text().count("\n") == sent, 10), (log.read_text().count("\n"), sent)
        growth = int(after) - before
        done.set()
        teller.join()
        client.close()
        told_at_end, said = node_0.communicate()
    sys.stdout.write(
        f"{MESSAGES} messages in {took:.1f} s, growth {growth >> 10} KiB, longest wait {max(waits):.3f} s\n"
    )
    assert growth < MOST_GROWTH
    assert (lost, refused) == ("0", "-")
    assert max(waits) < 5 * slowed()
    assert f"{sent} peers were refused" in told_at_end
    assert 1 <= said.count("distbench: refused") < 200  # now and then, on a terminal


def recorded_proof(secret: bytes) -> bytes:
    """Proof of the secret that a node sent in another session."""
    here, there = socket.socketpair()
    with here, there:
        asked = challenge()
        here.sendall(asked)
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            prove(there, secret)
        answer = here.recv(ANSWER_BYTES, socket.MSG_WAITALL)
    check_answer(secret, asked, answer)
    return answer


@pytest.mark.timeout(900)
def test_forged_messages_to_node_0_change_no_verdict(tmp_path: Path) -> None:
    cases = 120 if SOAK else 10
    suite = write_suite(tmp_path / "suite.json", range(cases), jitter=20 if SOAK else 0)  # as long as the attack
    secret = {"DISTBENCH_SECRET": secrets.token_hex(16)}
    port = free_port()
    several = ("--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", f"{LOOPBACK}:{port}", "--num-experts", "8")
    out = tmp_path / "out"
    with (
        Bench(out, "suite", suite, *several, **secret) as node_0,
        Bench(tmp_path / "other", "suite", suite, *several, "--node-rank", "1", **secret) as node_1,
    ):
        assert wait_until(lambda: len(node_0.reports) > 0, 60), node_0.stderr + node_1.stderr
        sent = attack(port, MESSAGES if SOAK else 200)
        assert [node_0.finish(300), node_1.finish(60)] == [0, 0], node_0.stderr + node_1.stderr
        assert set(node_0.verdicts.values()) == {"PASS"}
        assert len(node_0.verdicts) == cases
        logged = (out / "refused.log").read_text().count("\n")
        assert sent - gate.MOST_PEERS <= logged <= sent  # peers that were waiting when node 0 ended have no line
        assert secret["DISTBENCH_SECRET"] not in node_0.stderr + node_0.stdout + (out / "results.jsonl").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_unauthenticated_peer_is_refused_and_logged(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(gate, "PROOF_S", 0.3)
    monkeypatch.setattr("tests.attacks.KINDS", {kind: KINDS[kind]})
    assert attack(meeting.layout.port, 3) == 3
    assert len(meeting.refusals(3)) == 3
    assert meeting.leader.lost() == {}


def test_silent_peer_is_refused_after_the_proof_timeout(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PROOF_S", 0.3)
    with meeting.connect() as stranger:
        assert len(stranger.recv(1000)) == CHALLENGE_BYTES
        assert stranger.recv(1) == b""
    assert meeting.refusals() == ["did not prove the secret within 0.3 s"]


def test_oldest_unauthenticated_peer_is_dropped_if_a_node_connects(meeting: Meeting) -> None:
    strangers = [meeting.connect() for _ in range(gate.MOST_PEERS + 10)]
    client = Client(meeting.layout, SECRET, 5.0, [])
    assert client.tell(beat()).phase is Phase.WAIT
    assert meeting.refusals(11) == [f"made room: {gate.MOST_PEERS} peers were unproven"] * 11
    client.close()
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("secret", [b"", b"another secret than that of node 0"])
def test_node_with_another_secret_is_refused_as_invalid(meeting: Meeting, secret: bytes) -> None:
    with pytest.raises(InvalidCase, match="has another secret than this node; give all nodes the same"):
        Client(meeting.layout, secret, 5.0, [])
    assert meeting.refusals() == ["has another secret, or none"]


def test_node_refuses_a_node_0_that_does_not_prove_the_secret() -> None:
    with socket.create_server((LOOPBACK, 0)) as impostor:
        layout = NodeLayout(nodes=2, node=1, nproc=1, host=LOOPBACK, port=impostor.getsockname()[1], launch=0)

        def pretend() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(b"distbench nodes1" + bytes(32))
                connection.recv(ANSWER_BYTES, socket.MSG_WAITALL)
                connection.sendall(bytes(range(32)))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(InvalidCase, match="has another secret"):
            Client(layout, SECRET, 5.0, [])
        thread.join()


def test_node_refuses_a_listener_of_another_protocol() -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        layout = NodeLayout(nodes=2, node=1, nproc=1, host=LOOPBACK, port=other.getsockname()[1], launch=0)

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6 and some more, as long as a challenge\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(NodeLost, match="what listens there is no node 0"):
            Client(layout, SECRET, 0.0, [])
        thread.join()


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"exit": Exit(0, "SIGKILL")}, "reports rank 0, which is not on it"),
        ({"exit": Exit(4, "SIGKILL")}, "reports rank 4, which is not on it"),
        ({"heartbeat": {1: position()}}, "reports rank 1"),
        ({"machines": {-1: Machine("x", "cpu")}}, "reports rank -1"),
        ({"stacks": {5: "text"}}, "reports rank 5"),
        ({"heartbeat": {2: position(pid=1)}}, "a position that no rank can have"),  # a process of node 0
        ({"heartbeat": {2: position(stage=99)}}, "a position that no rank can have"),
        ({"heartbeat": {2: position(arm=-1)}}, "a position that no rank can have"),
        ({"heartbeat": {2: position(since_ns=-1)}}, "a position that no rank can have"),
        ({"heartbeat": {2: position(step=1 << 70)}}, "a position that no rank can have"),
        ({"host": "x\n\x1b[2J"}, "no name that a host may have"),
        (
            {"failures": [RankFailure(rank=0, exception="", message="", position=position(), traceback="", echo=False,
                                      timeout=False)]},
            "reports rank 0",
        ),
    ],
)  # fmt: skip
def test_node_that_reports_on_ranks_of_another_node_is_refused(
    meeting: Meeting, told: dict[str, Any], complaint: str
) -> None:
    client = Client(meeting.layout, SECRET, 5.0, [])
    with pytest.raises(NodeLost):
        client.tell(beat(**told))
    client.close()
    (line,) = meeting.refusals()
    assert line.startswith("knows the secret, but node 1 ")
    assert complaint in line
    assert meeting.leader.first_exit() is None


def test_second_connection_under_a_taken_node_number_is_refused(meeting: Meeting) -> None:
    first = Client(meeting.layout, SECRET, 5.0, [])
    first.tell(beat())
    second = Client(meeting.layout, SECRET, 5.0, [])
    with pytest.raises(InvalidCase, match="node 1 is other already, other claims it too"):
        second.tell(beat())
    with pytest.raises(NodeLost):
        first.tell(beat(node=2))
    assert meeting.refusals() == ["knows the secret, but speaks for two nodes"]
    first.close()
    second.close()


def channels() -> tuple[Channel, Channel, socket.socket, socket.socket]:
    here, there = socket.socketpair()
    return Channel(here, b"a" * 32, b"b" * 32), Channel(there, b"b" * 32, b"a" * 32), here, there


@pytest.mark.parametrize("damage", ["content", "mark", "replay", "reflection", "size"])
def test_modified_or_replayed_message_is_refused(damage: str) -> None:
    sender, receiver, here, there = channels()
    with here, there:
        sender.send(b"the order")
        raw = bytearray(there.recv(1000))
        if damage == "replay":
            here.sendall(raw)
            assert receiver.receive(100) == b"the order"
        elif damage == "reflection":
            there.sendall(raw)
            sender, receiver = receiver, sender
        elif damage == "size":
            raw[0] ^= 1
        else:
            raw[-1 if damage == "content" else 10] ^= 1
        if damage != "reflection":
            here.sendall(raw)
        with pytest.raises(Tampered):
            receiver.receive(100)


def test_log_of_refused_peers_has_a_bounded_number_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distbench.launcher.nodes.refusals.MOST_LINES", 10)
    refusals = Refusals(tmp_path / "log")
    for number in range(30):
        refusals.note(f"127.0.0.1:{number}", "said nothing")
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "more than 10 peers were refused; those that follow are counted only"
    assert refusals.summary() == f"30 peers were refused, {tmp_path / 'log'} has a line for each up to 10"
    later = Refusals(tmp_path / "log")  # of the next launch with that folder
    later.note("127.0.0.1:1", "said nothing")
    assert later.count == 1
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_log_of_refused_peers_continues_the_count_of_earlier_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distbench.launcher.nodes.refusals.MOST_LINES", 10)
    for number in range(3):
        refusals = Refusals(tmp_path / "log")
        for _ in range(4):
            refusals.note(f"127.0.0.1:{number}", "said nothing")
    lines = (tmp_path / "log").read_text().splitlines()
    assert (len(lines), sum("peers were refused" in line for line in lines)) == (11, 1)
