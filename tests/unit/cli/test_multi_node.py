"""Options of several nodes on the command line, and the reports that remain if nodes never connect."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import msgspec
import pytest
from lxml import etree

from distbench.case.entry import Entry
from distbench.cli import launching
from distbench.cli.launching import exported
from distbench.cli.main import _parser, main
from distbench.cli.multi_node import layout_of
from distbench.errors import InvalidCase, Unsupported
from distbench.launcher.job import Job, Machine, NodeLayout, ranks_folder
from distbench.launcher.nodes.client import Client
from distbench.launcher.nodes.leader import Leader
from distbench.launcher.nodes.protocol import Beat, Phase
from distbench.launcher.postmortem import machines
from distbench.report.export import FILES, load_writers, parse_targets
from distbench.report.results import Results
from distbench.utils.text import counted
from tests.cases import tiny_case
from tests.end_to_end.launches import wait_until, write_suite


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def layout(endpoint: str, *arguments: str) -> NodeLayout | None:
    told = ["suite", "smoke", "--nnodes", "2", "--rdzv-endpoint", endpoint, *arguments]
    return layout_of(_parser().parse_args(told))


@pytest.mark.parametrize(
    ("endpoint", "host", "port", "again"),
    [
        ("node0:29500", "node0", 29500, "node0:29500"),
        ("10.0.0.1:1", "10.0.0.1", 1, "10.0.0.1:1"),
        ("[::1]:65535", "::1", 65535, "[::1]:65535"),
        ("[fe80::1%eth0]:29500", "fe80::1%eth0", 29500, "[fe80::1%eth0]:29500"),
    ],
)
def test_rendezvous_endpoint_is_parsed_to_host_and_port(endpoint: str, host: str, port: int, again: str) -> None:
    found = layout(endpoint)
    assert found is not None
    assert (found.host, found.port, found.endpoint) == (host, port, again)


@pytest.mark.parametrize(
    "endpoint",
    ["", "node0", ":29500", "node0:", "node0:0", "node0:65536", "node0:x", "::1:29500", "[::1:29500", "[]:1", "a b:1"],
)
def test_malformed_rendezvous_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidCase, match=r"give HOST:PORT or \[IPV6\]:PORT"):
        layout(endpoint)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--nproc", "0"),
        ("--nproc", "-1"),
        ("--join-timeout", "nan"),
        ("--join-timeout", "-1"),
        ("--join-timeout", "inf"),
        ("--node-rank", "2"),
        ("--nnodes", "0"),
    ],
)
def test_contradictory_node_numbers_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(InvalidCase):
        layout("node0:29500", *arguments)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_node_0_accepts_connections_over_ipv4_and_ipv6(host: str) -> None:
    meeting = NodeLayout(nodes=2, node=0, nproc=1, host=host, port=free_port(), launch=0)
    leader = Leader(meeting, 1.0)
    client = Client(meeting, b"", 5.0, [])
    beat = Beat(node=1, nodes=2, nproc=1, host="other")
    assert client.tell(beat).phase is Phase.WAIT
    assert leader.place(1) == "other"
    leaving = threading.Thread(target=leader.close, args=(0,))
    leaving.start()
    assert wait_until(lambda: client.tell(beat).phase is Phase.END, 5)
    leaving.join()
    client.close()


def test_node_0_knows_the_host_of_every_rank(tmp_path: Path) -> None:
    meeting = NodeLayout(nodes=2, node=0, nproc=1, host="127.0.0.1", port=free_port(), launch=0)
    leader = Leader(meeting, 1.0)
    client = Client(meeting, b"", 5.0, [])
    beat = Beat(node=1, nodes=2, nproc=1, host="other")
    client.tell(beat)
    entry = Entry(name="case", case=tiny_case(2), sources={})
    job = leader.begin(Job(entries=(entry,), out=str(tmp_path), supervised=True), [])
    machine = Machine("other", "cuda:0")
    client.tell(msgspec.structs.replace(beat, launch=1, machines={1: machine}))
    ranks_folder(tmp_path).mkdir()
    leader.mirror(job)
    assert machines(tmp_path, job.num_ranks) == {1: machine}
    client.close()
    leader.close(0)


@pytest.mark.parametrize("command", ["suite", "run"])
def test_every_report_format_is_written_if_nodes_never_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(launching, "preload_ranks", lambda: None)
    suite = str(write_suite(tmp_path / "suite.json", range(3)))
    what = [suite, "--quiet", "--num-experts=8"] if command == "suite" else ["--model=tiny", "--num-experts=8"]
    nodes = ["--nnodes=2", "--nproc=1", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--join-timeout=0.1"]
    out = tmp_path / "out"
    assert main([command, *what, *nodes, f"--out={out}", f"--report={','.join(FILES)}"]) == 3
    assert "NODES_MISSING: node 1 did not join" in capsys.readouterr().err
    cases = 3 if command == "suite" else 1
    document = json.loads((out / "results.json").read_text())
    assert (document["results"], document["missing"], document["exit_code"]) == ([], cases, 3)
    (case,) = etree.fromstring((out / "junit.xml").read_bytes()).iter("testcase")
    assert f"{counted(cases, 'case')} of the suite without a result: node 1 did not join" in case[0].get("message")
    name = "suite" if command == "suite" else "distbench run"
    assert f'distbench_cases_missing{{case="",suite="{name}"}} {cases}.0' in (out / "results.prom").read_text()
    assert f"{counted(cases, 'case')} without a result" in (out / "results.md").read_text()


def test_failed_report_export_does_not_hide_the_original_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writers = load_writers(parse_targets("json", tmp_path))
    message = "what went wrong"
    with pytest.raises(Unsupported, match=message), exported(Results(tmp_path / "nowhere"), writers):
        raise Unsupported(message)
    assert "no reports: results" in capsys.readouterr().err
    with pytest.raises(InvalidCase, match="results"), exported(Results(tmp_path / "nowhere"), writers):
        pass
