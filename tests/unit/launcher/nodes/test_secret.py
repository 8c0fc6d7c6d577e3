"""The launch secret: its sources, and launches refused without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.launcher.nodes.secret import VARIABLE, read_secret

SECRET = "0123456789abcdef"  # noqa: S105 - no secret of anything


def secret_file(folder: Path, content: str = f"{SECRET}\n", mode: int = 0o600) -> str:
    path = folder / "secret"
    path.write_text(content)
    path.chmod(mode)
    return str(path)


def test_secret_file_overrides_the_variable(tmp_path: Path) -> None:
    assert read_secret("node0", "", {VARIABLE: f" {SECRET}\n"}) == SECRET.encode()
    assert read_secret("node0", secret_file(tmp_path, SECRET[::-1]), {VARIABLE: SECRET}) == SECRET[::-1].encode()


@pytest.mark.parametrize("host", ["node0", "10.0.0.1", "fd00::1", "0.0.0.0"])  # noqa: S104 - nothing is bound
def test_several_nodes_without_a_secret_are_refused_with_a_command_that_creates_one(host: str) -> None:
    with pytest.raises(InvalidCase, match=r"anyone who reaches .* export DISTBENCH_SECRET=\$\(openssl rand -hex 32\)"):
        read_secret(host, "", {})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_nodes_on_one_machine_need_no_secret(host: str) -> None:
    assert read_secret(host, "", {}) == b""
    assert read_secret(host, "", {VARIABLE: SECRET}) == SECRET.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o666])
def test_secret_file_readable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, mode=mode)
    with pytest.raises(InvalidCase, match=f"mode {mode:04o} lets others read it; chmod 600 {path}"):
        read_secret("127.0.0.1", path, {})


@pytest.mark.parametrize(("content", "complaint"), [("", "no secret"), ("short\n", "5 bytes; allowed are 16 to 4096")])
def test_guessable_secret_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(InvalidCase, match=complaint):
        read_secret("127.0.0.1", secret_file(tmp_path, content), {})


def test_missing_or_irregular_secret_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, complaint in (("nowhere", "No such file"), (".", "Is a directory"), ("pipe", "not a regular file")):
        with pytest.raises(InvalidCase, match=complaint):
            read_secret("node0", str(tmp_path / path), {})
    too_long = secret_file(tmp_path, "x" * 10_000)
    with pytest.raises(InvalidCase, match="allowed are 16 to 4096"):
        read_secret("node0", too_long, {})


@pytest.mark.parametrize("node", ["0", "1"])
@pytest.mark.parametrize("command", [["run", "--model", "tiny"], ["suite", "smoke"]])
def test_command_opens_no_port_without_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], node: str
) -> None:
    nodes = ["--nnodes", "2", "--node-rank", node, "--rdzv-endpoint", "192.0.2.1:29500"]
    assert main([*command, *nodes, "--nproc", "1", "--out", str(tmp_path / "out")]) == 2
    assert "INVALID: DISTBENCH_SECRET: no secret" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
