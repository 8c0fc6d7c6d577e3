"""Waits of a launch say what they wait for, and for how long: a lock, the other nodes, node 0."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from distbench.errors import Busy
from distbench.launcher.job import Job, NodeLayout
from distbench.launcher.locks import hold
from distbench.launcher.nodes.client import Client, NodeLost
from distbench.launcher.nodes.leader import Leader, NodesMissing
from distbench.report import progress
from distbench.utils.voice import Voice, set_voice

WAIT_S = 0.4


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A line of the log at each look."""
    monkeypatch.setattr(progress.Log, "every_s", 0.05)
    monkeypatch.setattr(progress, "WAKE_S", 0.02)
    yield
    set_voice(Voice.USUAL)


@pytest.fixture
def layout() -> NodeLayout:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return NodeLayout(nodes=4, node=0, nproc=1, host="127.0.0.1", port=port, launch=0)


@pytest.mark.parametrize("voice", [Voice.USUAL, Voice.QUIET])
def test_wait_for_a_lock_names_the_folder_and_its_holder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], voice: Voice
) -> None:
    set_voice(voice)
    with hold(tmp_path, (), 0.0), pytest.raises(Busy), hold(tmp_path, (), WAIT_S):
        pass
    said = f"distbench: waiting {WAIT_S} s for folder {tmp_path}, in use by process "
    assert (said in capsys.readouterr().err) == (voice is Voice.USUAL)


def test_wait_for_nodes_names_those_that_are_missing(layout: NodeLayout, capsys: pytest.CaptureFixture[str]) -> None:
    leader = Leader(layout, WAIT_S)
    try:
        with pytest.raises(NodesMissing, match="node 1-3 did not join"):
            leader.begin(Job(entries=(), out="", supervised=True), [])
    finally:
        leader.close(3)
    assert "s for nodes: 1/4, node 1-3 missing, for 0 s\n" in capsys.readouterr().err


def test_wait_for_node_0_names_its_address(layout: NodeLayout, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NodeLost):
        Client(layout, b"", WAIT_S, [])
    assert f"s for node 0 at 127.0.0.1:{layout.port}: for 0 s\n" in capsys.readouterr().err
