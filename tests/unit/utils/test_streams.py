"""Output in encodings other than UTF-8, and the exit code of a crash of the bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from typing import BinaryIO

import pytest

from distbench.report.export import STANDARD_OUTPUT, write_reports
from distbench.report.terminal import print_json
from distbench.utils.streams import speak_any_encoding
from tests.end_to_end.launches import ROOT

PLAIN = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
RUN = ("run", "--model=tiny", "--nproc=1", "--tokens=2", "--max-dispatch-tokens-per-rank=64")


def distbench(*arguments: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "distbench", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environ, cwd=ROOT, timeout=500, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_missing_in_an_encoding_are_escaped(encoding: str) -> None:
    raw = BytesIO()
    stream = TextIOWrapper(raw, encoding=encoding)
    speak_any_encoding(stream)
    stream.write("a \u2192 b \u4e16 \u00e9")
    stream.flush()
    spelled = {"ascii": b"a -> b \\u4e16 \\xe9", "latin-1": b"a -> b \\u4e16 \xe9"}
    assert raw.getvalue() == spelled.get(encoding, "a \u2192 b \u4e16 \u00e9".encode())


@pytest.mark.parametrize("environ", PLAIN, ids=str)
def test_run_passes_in_any_encoding(environ: dict[str, str], tmp_path: pytest.TempPathFactory) -> None:
    done = distbench(*RUN, "--out", str(tmp_path), **environ)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"padded -> truncated" in done.stdout
    assert b"PASS (emulated: " in done.stdout


@pytest.mark.parametrize("environ", [*PLAIN, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "TERM": "dumb"}], ids=str)
def test_tables_and_lines_are_ascii_where_the_locale_has_no_more(environ: dict[str, str]) -> None:
    done = distbench("kernels", "--limits=64", "--aiter-version=0.1.16", **environ)
    assert done.returncode == 0, done.stderr
    told = done.stdout.decode("ascii")
    assert "------" in told
    assert "\\u" not in told


def write_plain(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_documents_on_standard_output_say_the_same_in_any_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    raw = BytesIO()
    stream = TextIOWrapper(raw, encoding=encoding)
    speak_any_encoding(stream)
    monkeypatch.setattr("sys.stdout", stream)
    told = "a \u2192 b \U0001f600 \u00e9 \x1b[2J"
    print_json({"name": told})
    assert json.loads(raw.getvalue().decode(encoding)) == {"name": told}
    raw.truncate(0)
    raw.seek(0)
    write_reports(told, {STANDARD_OUTPUT: write_plain})
    assert raw.getvalue() == told.encode()


_CRASH = """
import sys
from distbench.cli import main as command_line
command_line.main = lambda: {}["crash"]
sys.argv = ["distbench"]
from distbench.__main__ import main
main()
"""


def test_crash_of_the_bench_exits_70() -> None:
    done = subprocess.run([sys.executable, "-c", _CRASH], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 70
    assert done.stderr.splitlines()[-1] == "KeyError: 'crash'"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_command_without_standard_output_or_error_ends_as_with_them(closed: str) -> None:
    command = ["sh", "-c", f'"$0" -m distbench presets {closed}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("qwen3-30b-a3b" in done.stdout) == (closed == "2>&-")
