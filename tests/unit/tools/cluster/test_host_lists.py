"""Host files and node lists in the forms that schedulers and MPI launchers write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.tools.cluster.host_lists import parse_host_file, parse_hosts


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a,b c", ["a", "b", "c"]),
        ("node[01-04]", ["node01", "node02", "node03", "node04"]),
        ("node[01-02,07]", ["node01", "node02", "node07"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[008-010]", ["n008", "n009", "n010"]),
        ("n[98-101]", ["n98", "n99", "n100", "n101"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("node[1-2]-ib0.cluster.local,login", ["node1-ib0.cluster.local", "node2-ib0.cluster.local", "login"]),
        ("gpu[3],gpu[5-6]", ["gpu3", "gpu5", "gpu6"]),
        ("10.0.0.1:8,10.0.0.2:8", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_node_list_is_expanded_in_order(text: str, names: list[str]) -> None:
    assert list(parse_hosts(text).names) == names


@pytest.mark.parametrize(
    ("content", "slots"),
    [
        ("a slots=8\nb slots=4 max_slots=8\n", {"a": 8, "b": 4}),
        ("a:8\nb:4\n", {"a": 8, "b": 4}),
        ("# two nodes\n\na # first\n  b\r\n", {"a": None, "b": None}),
        ("\ufeffa\nb", {"a": None, "b": None}),
        ("a\na\nb\nb\n", {"a": 2, "b": 2}),  # PBS_NODEFILE, LSB_DJOB_HOSTFILE
        ("node[01-02] slots=8", {"node01": 8, "node02": 8}),
        ("a b\nc", {"a": None, "b": None, "c": None}),
        ("a cpu=2", {"a": 2}),
    ],
)
def test_every_host_file_form_is_parsed(content: str, slots: dict[str, int | None]) -> None:
    found = parse_host_file(content, "hosts")
    assert {name: found.slots.get(name) for name in found.names} == slots


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no name"),
        ("a,a", "a is named twice"),
        ("node[1-2],node2", "node2 is named twice"),
        ("node[04-01]", "'04-01' is no range"),
        ("node[a-b]", "'a-b' is no range"),
        ("node[]", "'' is no range"),
        ("node[1-2", "brackets do not match"),
        ("node1-2]", "brackets do not match"),
        ("node[1-[2]]", "brackets do not match"),
        ("node[0-99999999]", "no range of up to 65536 numbers"),
        ("r[0-999]n[0-999]", "1000000 hosts, allowed are 65536"),
        ("-oProxyCommand=x", "allowed behind a host are slots=N"),
        ("-o", "'-o' is no host name"),
        ("a;b", "'a;b' is no host name"),
        ("a$(x)", "is no host name"),
    ],
)
def test_node_list_that_names_no_hosts_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidCase, match=re.escape(complaint)):
        parse_hosts(text)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a\nb ansible_host=10.0.0.1\n", "hosts, line 2: 'ansible_host=10.0.0.1': allowed behind a host"),
        ("[gpu]\na\n", "hosts, line 1: "),
        ("# nothing\n", "hosts: no host"),
        ("a 8\nb 8\n", "hosts, line 1: nodes: '8' is no host name"),  # the form of PE_HOSTFILE
    ],
)
def test_malformed_host_file_line_is_refused_with_its_number(content: str, complaint: str) -> None:
    with pytest.raises(InvalidCase) as caught:
        parse_host_file(content, "hosts")
    assert complaint in str(caught.value)


def test_host_file_slots_that_differ_from_nproc_give_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=4\n")
    arguments = ["--nodes", f"@{hosts}", "--launcher", '["/nowhere/ssh", "{host}"]', "--out", str(tmp_path / "out")]
    assert main(["cluster", "smoke", *arguments]) == 2
    told = capsys.readouterr().err
    assert "slots of b 4 are not used: 8 ranks on each (--nproc)" in told


def test_slurm_node_list_is_expanded_without_scontrol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[01-02]")
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["--launcher", '["/nowhere/ssh", "{host}"]', "--out", str(tmp_path / "out")]
    assert main(["cluster", "smoke", *arguments]) == 2
    assert "launcher '/nowhere/ssh'" in capsys.readouterr().err
