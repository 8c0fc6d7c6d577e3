"""`make amd` on a fake new node: it continues after each failure, and writes one archive of reports, logs and facts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "amd.py"
FAKE_PYTHON = """#!/bin/sh
case "$*" in
*submodule_search_locations*) case "$*" in *ldd*) ;; *) echo "{folder}/aiter";; esac;;
*" mori"*) printf 'Traceback (most recent call last):\\nImportError: libgrpc++.so.1.51: cannot open\\n' >&2; exit 1;;
*) echo fine;;
esac
"""
FAKE_DISTBENCH = """#!/bin/sh
echo "$*" >> "{calls}"
case "$*" in
doctor*) echo "missing   mori   not installed"; exit 2;;
kernels*) echo "limit 64: bucket 64, other kernel"; exit 0;;
*"--transport mori"*"max-recv-1"*) echo "token $MY_SECRET"; sleep {sleep}; exit 3;;
*"--transport mori"*) echo "distbench: UNSUPPORTED: transport mori: no package mori here"; exit 77;;
esac
while [ "$1" != --out ]; do shift; done
mkdir -p "$2"; echo '{{"verdict": "PASS", "reasons": [], "emulated": true}}' > "$2/report.json"
"""
FAKE_CORRUPT = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != --out ]; do shift; done
[ $# -gt 0 ] || exit 0
mkdir -p "$2"; echo '{"verdict": "CORRUPT"}' > "$2/report.json"
exit 1
"""
TOOL = "#!/bin/sh\necho gfx942 agent\n"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Node:
    """A folder that acts as a node: an environment, and tools with scripted results."""

    def __init__(self, folder: Path, sleep: float = 0) -> None:
        self.folder, self.out, self.calls = folder, folder / "out", folder / "calls"
        executable(folder / "venv" / "bin" / "python", FAKE_PYTHON.format(folder=folder))
        executable(folder / "venv" / "bin" / "distbench", FAKE_DISTBENCH.format(calls=self.calls, sleep=sleep))
        executable(folder / "bin" / "rocminfo", TOOL)
        executable(folder / "bin" / "make", "#!/bin/sh\necho no network >&2\nexit 2\n")

    def start(self, *arguments: str, venv: str = "venv") -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), "--nproc", "4", "--venv", str(self.folder / venv)]
        environ = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "MY_SECRET": "hf_abcdefgh",
            "MORI_RDMA_TC": "96",
            "SOME_NAME": "some value",
        }
        return subprocess.Popen(
            [*command, "--out", str(self.out), *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def texts(self) -> dict[str, str]:
        """Texts in the archive, by name."""
        with tarfile.open(f"{self.out}.tar.gz") as tar:
            names = [one.name for one in tar.getmembers()]
            assert {name.split("/")[0] for name in names} == {"out"}
            found = {name.partition("/")[2]: tar.extractfile(name) for name in names}
            return {name: file.read().decode() for name, file in found.items() if file is not None}


def test_every_step_runs_and_the_first_failure_is_named(tmp_path: Path) -> None:
    node = Node(tmp_path)
    process = node.start("--tokens", "32")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "First failure: **setup**. distbench cannot be installed here" in output
    texts = node.texts()
    summary = texts["summary.md"]
    assert "| setup | 2 | 0 |" in summary
    assert "| import-mori | 1 | 0 | 0 | **FAILED** ImportError: libgrpc++.so.1.51: cannot open |" in summary
    assert "| doctor | 2 | 0 or 1 |" in summary
    assert "| cpu | 0 | 0 PASS | 0 | PASS (emulated) |" in summary
    assert "**FAILED** distbench: UNSUPPORTED: transport mori: no package mori here |" in summary
    assert "| short-limit | 3 | 1 UNDER_LIMIT |" in summary
    calls = node.calls.read_text().splitlines()
    assert len(calls) == 11
    assert sum("--tokens 32" in call for call in calls) == 7
    assert "no network" in output
    assert f"send {node.out}.tar.gz" in output


def test_archive_holds_reports_and_build_logs_and_no_secret(tmp_path: Path) -> None:
    node = Node(tmp_path)
    executable(tmp_path / "aiter" / "jit" / "build" / "module_moe" / "build.log", "hipcc: error: no such instruction")
    executable(tmp_path / "aiter" / "jit" / "build" / "lock_module_moe", "12345 somewhere")
    executable(tmp_path / ".mori" / "jit" / "gfx942" / "ep.hsaco", "binary")
    node.start("--skip-setup").communicate(timeout=90)
    texts = node.texts()
    (log,) = [text for name, text in texts.items() if name.endswith("build.log.txt")]
    assert "no such instruction" in log
    assert "12345" in next(text for name, text in texts.items() if name.endswith("lock_module_moe.txt"))
    assert "gfx942/ep.hsaco" in texts["build/caches.txt"]
    wanted = [
        *("summary.md", "node/variables.txt", "node/process.txt", "node/rocm/rocminfo.txt", "node/system/limits.txt"),
        *("node/rocm/rocm-smi.txt", "node/system/dmesg-after.txt", "node/system/shared-memory-after.txt"),
        *("node/code/commit.txt", "node/files/etc.os-release.txt", "build/caches.txt"),
        *("logs/doctor.log", "logs/import-aiter.log", "logs/packages.log", "logs/libraries.log", "logs/smoke.log"),
        "steps/cpu/report.json",
    ]
    assert [name for name in wanted if name not in texts] == []
    assert "gfx942 agent" in texts["node/rocm/rocminfo.txt"]
    assert "No such file" in texts["node/rocm/rocm-smi.txt"]
    assert "Traceback" in texts["logs/import-mori.log"]
    assert "MORI_RDMA_TC=96" in texts["node/variables.txt"]
    assert "MY_SECRET (left out)" in texts["node/variables.txt"]
    assert "SOME_NAME (left out)" in texts["node/variables.txt"]
    assert "token (left out)" in texts["logs/short-limit.log"]
    assert [name for name, text in texts.items() if "hf_abcdefgh" in text or "some value" in text] == []
    assert json.loads(texts["steps/cpu/report.json"])["verdict"] == "PASS"


def test_archive_is_written_without_a_python_environment(tmp_path: Path) -> None:
    node = Node(tmp_path)
    process = node.start(venv="nowhere")
    process.communicate(timeout=90)
    assert process.returncode == 1
    summary = node.texts()["summary.md"]
    assert (
        f"| smoke | None | 0 PASS | 0 | **FAILED** not run: there is no {tmp_path}/nowhere/bin/distbench |" in summary
    )
    assert not node.calls.exists()


def test_step_that_ends_in_another_verdict_than_expected_fails(tmp_path: Path) -> None:
    node = Node(tmp_path)
    executable(tmp_path / "venv" / "bin" / "distbench", FAKE_CORRUPT)
    process = node.start("--skip-setup")
    process.communicate(timeout=90)
    assert process.returncode == 1
    assert "| short-limit | 1 | 1 UNDER_LIMIT | 0 | **FAILED** CORRUPT |" in node.texts()["summary.md"]


@pytest.mark.parametrize("interrupted", [None, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_step_beyond_its_timeout_is_killed_and_reported(tmp_path: Path, interrupted: signal.Signals | None) -> None:
    node = Node(tmp_path, sleep=600)
    process = node.start("--skip-setup", "--step-timeout", "60" if interrupted else "3")
    if interrupted:
        deadline = time.monotonic() + 60
        while "max-recv-1" not in (node.calls.read_text() if node.calls.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(interrupted)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == (130 if interrupted else 1)
    summary = node.texts()["summary.md"]
    if interrupted:
        assert "interrupted; what there is goes into the archive" in output
        assert "| short-limit" not in summary
    else:
        assert "**FAILED** no end within 3 s" in summary
