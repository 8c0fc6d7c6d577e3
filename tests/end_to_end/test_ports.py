"""Ports that a bench opens: on one machine only loopback addresses."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.end_to_end.launches import Bench, wait_until, write_suite

_LISTENING = "0A"
_LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # as the kernel writes 127.0.0.1 and ::1


def listening(pids: list[int]) -> set[str]:
    """Addresses on which these processes listen, in the kernel's hexadecimal."""
    inodes = {inode for pid in pids for inode in _sockets(pid)}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {words[1].partition(":")[0] for words in lines if words[3] == _LISTENING and words[9] in inodes}


def _sockets(pid: int) -> set[str]:
    found = set()
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                found.add(target[len("socket:[") : -1])
    except OSError:  # the process has ended, or closed the file meanwhile
        pass
    return found


@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_of_one_machine_listen_on_loopback_only(tmp_path: Path, nodes: int) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2000))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    several = ("--nnodes", "2", "--rdzv-endpoint", endpoint) if nodes > 1 else ()
    arguments = ("suite", suite, "--nproc", "2", "--num-experts", "8", *several)
    with Bench(tmp_path / "out", *arguments) as node_0:
        benches = [node_0]
        if nodes > 1:
            other = Bench(tmp_path / "other", *arguments, "--node-rank", "1")
            benches.append(other)
        try:
            assert wait_until(lambda: len(node_0.reports) > 1, 60), node_0.stderr
            found = listening([pid for bench in benches for pid in bench.left()])
        finally:
            for bench in benches[1:]:
                bench.end_at_once()
    assert found
    assert found <= _LOOPBACK
