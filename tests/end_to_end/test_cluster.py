"""`distbench cluster` as a process: over fake nodes, and over real ranks."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lxml import etree
from prometheus_client.parser import text_string_to_metric_families as parse_metrics

from distbench.cli.main import main
from distbench.report.export import FILES
from distbench.tools.cluster import group_runs, processes
from tests.end_to_end.launches import ROOT, SOAK, Bench, command_line, faulty, slowed, wait_until, write_suite

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
def test_planted_fault_is_named_with_its_nodes_and_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    planted: dict[str, Any],
    code: int,
    findings: list[tuple[str, list[str]]],
) -> None:
    limit = f"{10 * slowed():.0f}" if "hangs" in planted.values() else "100"  # no healthy node is to reach it
    found, document = validate(tmp_path, monkeypatch, "a,b,c", planted, "--trial-timeout", limit)
    defects = [nodes[0] for kind, nodes in findings if kind == "node"]
    assert (found, document["defects"]) == (code, defects)
    assert [(one["kind"], sorted(one["nodes"])) for one in document["findings"]] == findings
    assert (tmp_path / "defects.txt").read_text().split() == defects
    if code == 2:
        assert document["not_run"] == ["pairs", "all"]


@pytest.mark.parametrize(
    ("planted", "defects"), [({"b": "on the CPU"}, ["b"]), (dict.fromkeys("abc", "on the CPU"), [])]
)
def test_node_that_passes_on_another_device_type_than_most_is_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: dict[str, Any], defects: list[str]
) -> None:
    code, document = validate(tmp_path, monkeypatch, "a,b,c", planted)
    alone = {trial["nodes"][0]: trial["devices"] for trial in document["trials"] if trial["step"] == "nodes"}
    assert alone == {node: ["cpu" if node in planted else "cuda"] for node in "abc"}
    assert (code, document["defects"]) == (77 if defects else 0, defects)
    if defects:
        assert document["findings"][0]["evidence"] == "fails alone: UNSUPPORTED: ran on cpu, 2 of 3 on cuda"
        code, document = validate(tmp_path, monkeypatch, "a,b", planted, "--plan", "nodes")
        assert (code, document["defects"]) == (77, ["b"])


def test_requested_device_is_required_of_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = dict.fromkeys("abc", "on the CPU")
    code, document = validate(tmp_path, monkeypatch, "a,b,c", planted, "--device", "cuda")
    assert (code, [one["kind"] for one in document["findings"]]) == (77, ["common"])


def test_verdict_of_a_group_is_awaited_unless_the_group_lost_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process of a group to fail is not always the one that writes the group's verdict."""
    slow = slowed()
    monkeypatch.setattr(group_runs, "_PARTING_S", 4.0 * slow)
    started = time.monotonic()
    code, document = validate(tmp_path, monkeypatch, "a,b", {"a+b": "late CORRUPT"}, "--plan", "pairs")
    assert (code, [trial["verdict"] for trial in document["trials"]]) == (1, ["CORRUPT"])
    code, document = validate(tmp_path, monkeypatch, "a,b", {"a+b": "half dies"}, "--plan", "pairs")
    assert (code, [trial["verdict"] for trial in document["trials"]]) == (3, ["RANK_FAULT"])
    assert time.monotonic() - started < 30 * slow


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("nowhere.toml",), "nowhere.toml"),
        (("smoke", "--select", "!gaussian"), "'!gaussian'"),
        (("smoke", "--select", "name~nothing is called so"), "select"),
        (("smoke", "--select", "model=deepseek-v3"), "select"),
    ],
)
def test_suite_that_selects_no_case_is_refused_before_any_node_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    out = tmp_path / "out"
    assert main(["cluster", *arguments, "--nodes", "a,b", "--launcher", FAKE, "--out", str(out)]) == 2
    assert complaint in capsys.readouterr().err
    assert not (out / "trials").exists()


def test_last_words_of_a_node_that_exits_are_quoted_as_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, document = validate(tmp_path, monkeypatch, "a,b", {"b": "dies"}, "--plan", "nodes")
    (finding,) = document["findings"]
    assert finding["evidence"].endswith("b exited with 9: the power went")


def test_folder_that_a_node_does_not_share_is_invalid_and_no_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLANTED", json.dumps({"b": "elsewhere"}))
    assert main(["cluster", "smoke", "--nodes", "a,b,c", "--launcher", FAKE, "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "INVALID: --out" in told
    assert "not the same folder on all nodes (b: " in told
    assert "No such file or directory" in told
    assert not (tmp_path / "trials").exists()
    assert not (tmp_path / "defects.txt").exists()


def test_unreachable_node_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, document = validate(tmp_path, monkeypatch, "a,b", {"b": "gone"}, "--plan", "nodes")
    assert (code, document["defects"]) == (3, ["b"])


def test_node_that_ignores_termination_is_abandoned_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PARTING_S", 0.5)
    limit = f"{min(10 * slowed(), 50):.0f}"  # the deaf node ends after 60 s
    code, document = validate(tmp_path, monkeypatch, "a,b", {"b": "deaf"}, "--plan", "nodes", "--trial-timeout", limit)
    assert (code, document["defects"]) == (3, ["b"])
    assert f"HANG: no end within {limit} s" in document["findings"][0]["evidence"]


def test_slow_nodes_are_reported_as_not_judged_below_five_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = validate(tmp_path, monkeypatch, "a,b,c,d", {"d": 9.0}, "--plan", "nodes")
    assert (code, document["slow"]) == (0, [])
    assert document["not_judged"] == ["slow nodes: 4 nodes pass, at least 5 are needed to tell which is slow"]
    assert "not judged: slow nodes: 4 nodes pass" in capsys.readouterr().out
    _, document = validate(tmp_path, monkeypatch, "a,b,c,d,e", {}, "--plan", "nodes")
    assert document["not_judged"] == []


def test_every_report_format_names_the_groups_and_the_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {"a+c": "CORRUPT"}
    code, document = validate(tmp_path, monkeypatch, "a,b,c", planted, "--report", ",".join(FILES))
    assert code == 1
    root = etree.fromstring((tmp_path / "junit.xml").read_bytes())
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert {"a", "b", "c", "a+b", "a+c", "b+c", "a+b+c", "link a c"} < cases.keys()
    assert {name for name, case in cases.items() if case.find("failure") is not None} == {"a+c", "a+b+c", "link a c"}
    assert "CORRUPT" in cases["a+c"].find("failure").get("message")
    assert {str(case.get("classname")).rpartition(".")[0] for case in cases.values()} == {"distbench.cluster.smoke"}
    assert cases["slow nodes"].find("skipped") is not None
    families = {family.name: family for family in parse_metrics((tmp_path / "results.prom").read_text())}
    groups = {
        (one.labels["step"], one.labels["result"]): one.value for one in families["distbench_cluster_groups"].samples
    }
    assert groups["pairs", "pass"] == 2
    assert groups["pairs", "fail"] == 1
    assert families["distbench_cluster_exit_code"].samples[0].value == 1
    assert {one.labels["suite"] for family in families.values() for one in family.samples} == {"smoke"}
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["nodes"] for row in rows if row["verdict"] == "CORRUPT"] == ["a c", "a b c"]
    assert json.loads((tmp_path / "results.json").read_text()) == document
    told = (tmp_path / "results.md").read_text()
    assert "exit 1, 5 of 7 groups pass" in told
    assert "| link | a c |" in told
    page = (tmp_path / "results.html").read_text()
    assert "1 link at fault" in page
    (tmp_path / "results.html").unlink()
    assert main(["report", str(tmp_path), "--report", "html"]) == 1
    assert (tmp_path / "results.html").read_text() == page


def test_slow_node_is_written_to_slow_txt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_contradictory_cluster_arguments_are_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "smoke", "--nodes", "a,b", "--launcher", FAKE, "--out", str(tmp_path), *arguments]) == 2
    assert "INVALID" in capsys.readouterr().err


def test_signal_to_cluster_command_leaves_no_process(tmp_path: Path) -> None:
    environ = {"PLANTED": json.dumps({"a": "hangs"})}
    with Bench(tmp_path / "out", "cluster", "smoke", "--nodes", "a,b", "--launcher", FAKE, **environ) as bench:
        assert wait_until((tmp_path / "out" / "trials" / "nodes" / "b" / "results.jsonl").exists, 20)
        os.kill(bench.process.pid, signal.SIGTERM)
        assert bench.finish(20) == 143
        assert wait_until(bench.gone, 2)


@pytest.mark.parametrize("launchers_too", [False, True] if SOAK else [True])
def test_ranks_on_other_nodes_end_when_the_cluster_command_is_killed(tmp_path: Path, launchers_too: bool) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2000))
    launcher = json.dumps([sys.executable, str(ROOT / "tests" / "far_node.py"), "{host}"])
    more = ("--nodes", "a,b", "--launcher", launcher, "--nproc", "1", "--plan", "pairs", "--endpoint-host", "127.0.0.1")
    with Bench(tmp_path / "out", "cluster", suite, *more) as bench:
        results = bench.out / "trials" / "pairs" / "a+b" / "results.jsonl"
        assert wait_until(lambda: results.exists() and results.read_bytes().count(b"\n") > 1, 60)
        bench.process.kill()
        for pid in bench.left() if launchers_too else ():
            if "far_node.py" in command_line(pid):
                os.kill(pid, signal.SIGKILL)
        assert wait_until(bench.gone, 20)


def test_broken_node_with_real_ranks_is_named(tmp_path: Path) -> None:
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
