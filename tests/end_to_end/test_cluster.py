"""`distbench cluster` as a process: over nodes that are acted, and over real ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distbench.cli import main
from distbench.cluster import trials
from tests.end_to_end.launches import ROOT, SOAK, Bench, faulty, write_suite

FAKE = json.dumps([sys.executable, str(ROOT / "tests" / "fake_node.py"), "{host}"])


def validate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: str, planted: dict[str, Any], *more: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setenv("PLANTED", json.dumps(planted))
    arguments = ["cluster", "smoke", "--nodes", nodes, "--launcher", FAKE, "--out", str(tmp_path), *more]
    code = main(arguments)
    document: dict[str, Any] = json.loads((tmp_path / "cluster.json").read_text())
    assert document["exit_code"] == code
    return code, document


@pytest.mark.parametrize(
    ("planted", "code", "findings"),
    [
        ({}, 0, []),
        ({"b": "CORRUPT"}, 1, [("node", ["b"])]),
        ({"b": "silent"}, 3, [("node", ["b"])]),
        ({"b": "dies"}, 3, [("node", ["b"])]),
        ({"c": "hangs"}, 3, [("node", ["c"])]),
        ({"a+c": "CORRUPT"}, 1, [("link", ["a", "c"])]),
        ({"a+c": "HANG", "b+c": "RANK_FAULT"}, 3, [("node", ["c"])]),
        ({"a+b+c": "CORRUPT"}, 1, [("scale", ["a", "b", "c"])]),
        ({"a": "INVALID", "b": "INVALID", "c": "INVALID"}, 2, [("common", [])]),
    ],
)
def test_a_planted_fault_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    planted: dict[str, Any],
    code: int,
    findings: list[tuple[str, list[str]]],
) -> None:
    found, document = validate(tmp_path, monkeypatch, "a,b,c", planted, "--trial-timeout", "2")
    defects = [nodes[0] for kind, nodes in findings if kind == "node"]
    assert (found, document["defects"]) == (code, defects)
    assert [(one["kind"], sorted(one["nodes"])) for one in document["findings"]] == findings
    assert (tmp_path / "defects.txt").read_text().split() == defects
    if code == 2:
        assert document["not_run"] == ["pairs", "all"]


def test_what_a_group_finds_is_waited_for_and_one_that_lost_a_node_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process of a group to fail is not always the one that writes the group's verdict."""
    monkeypatch.setattr(trials, "_PARTING_S", 4.0)
    started = time.monotonic()
    code, document = validate(tmp_path, monkeypatch, "a,b", {"a+b": "late CORRUPT"}, "--plan", "pairs")
    assert (code, [trial["verdict"] for trial in document["trials"]]) == (1, ["CORRUPT"])
    code, document = validate(tmp_path, monkeypatch, "a,b", {"a+b": "half dies"}, "--plan", "pairs")
    assert (code, [trial["verdict"] for trial in document["trials"]]) == (3, ["RANK_FAULT"])
    assert time.monotonic() - started < 30


def test_a_slow_node_is_listed_for_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, document = validate(tmp_path, monkeypatch, "a,b,c,d,e,f", {"d": 2.5}, "--plan", "nodes")
    assert (code, document["defects"], document["slow"]) == (1, [], ["d"])
    assert (tmp_path / "slow.txt").read_text() == "d\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--plan", "nodes,triples"],
        ["--nodes", "a,a"],
        ["--nodes", "a,-oProxyCommand=x"],
        ["--nodes", "a;b"],
        ["--nodes", "@/nowhere"],
        ["--nodes", ""],
        ["--launcher", "rsh"],
        ["--launcher", '["ssh", "host"]'],
        ["--launcher", '["/nowhere/ssh", "{host}"]'],
        ["--nproc", "0"],
        ["--port", "65535"],
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "smoke", "--nodes", "a,b", "--launcher", FAKE, "--out", str(tmp_path), *arguments]) == 2
    assert "INVALID" in capsys.readouterr().err


def test_a_signal_leaves_no_process(tmp_path: Path) -> None:
    environ = {"PLANTED": json.dumps({"a": "hangs"})}
    with Bench(tmp_path / "out", "cluster", "smoke", "--nodes", "a,b", "--launcher", FAKE, **environ) as bench:
        deadline = time.monotonic() + 20
        while not (tmp_path / "out" / "trials" / "nodes" / "b" / "results.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(bench.process.pid, signal.SIGTERM)
        assert bench.finish(20) == 143
        assert bench.gone()


def test_real_ranks_one_node_of_which_is_broken(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", [0])
    node = tmp_path / "node.py"
    broken = json.dumps(faulty("raise:0:0"))
    node.write_text(
        "import os, sys\n"
        f"extra = {broken} if sys.argv[1] == 'b' else {{}}\n"
        "os.execve(sys.argv[2], sys.argv[2:], os.environ | extra)\n"
    )
    launcher = json.dumps([sys.executable, str(node), "{host}"])
    steps = "nodes,pairs,all" if SOAK else "nodes"
    nodes = "a,b,c,d" if SOAK else "a,b"
    command = ["cluster", str(suite), "--nodes", nodes, "--launcher", launcher, "--nproc", "1", "--plan", steps]
    done = subprocess.run(
        [sys.executable, "-m", "distbench", *command, "--endpoint-host", "127.0.0.1", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "out" / "defects.txt").read_text() == "b\n", done.stdout + done.stderr
    assert done.returncode == 3
    assert "emulated: all nodes are this machine" in done.stdout
