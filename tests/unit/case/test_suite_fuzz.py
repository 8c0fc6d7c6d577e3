"""Any table and any bytes give a suite or a case, or are refused in one line.

`DISTBENCH_FUZZ=20000 pytest tests/unit/case/test_suite_fuzz.py` tries that many examples for each test, in minutes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distbench.case.resolve import Layer, load_case_file, resolve_case
from distbench.case.spec import Case
from distbench.case.suite import Suite, load_suite, select
from distbench.case.suite_file import CASE_KEYS, builtin_suites
from distbench.cli.main import main
from distbench.errors import InvalidCase, Overflow, Unsupported
from distbench.report.journal import Summary

MAX_EXAMPLES = int(os.environ.get("DISTBENCH_FUZZ", "100"))
BUILTIN = sorted(builtin_suites().values())
CASE_FILE = b"""model = "tiny"
tokens = [0, 1, 7, 33, "..."]
limit = "max-recv-1"
policy = "unchecked"
timeout = 12.5
recv_bound = false
seed = 0x7f
"""

NOTE = re.compile(
    r"distbench: (.+: \d+ of \d+ cases equal others and run once: |.*keys set and not used by this case: )"
)
"""A note of a suite that has a case twice, or a key that a case does not use."""

pytestmark = pytest.mark.timeout(0 if "DISTBENCH_FUZZ" in os.environ else 120)
sample = settings(
    max_examples=min(MAX_EXAMPLES, 1000), deadline=None, suppress_health_check=list(HealthCheck), database=None
)
fuzz = settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)

scalars = st.one_of(
    st.sampled_from(["off", "max-recv", "max-recv-1", "sum", "capacity+1", "tiny", "tiny-odd", "strict", "guard"]),
    st.sampled_from(["fp8", "gaussian", "fan-in:0", "PASS", "by-limit", "...", "", "16", "a\nb", "\u2028", "1,2,..."]),
    st.integers(-1, 20),
    st.integers(),
    st.booleans(),
    st.floats(),
    st.none(),
    st.text(max_size=8),
)
values = scalars | st.lists(st.integers(0, 9) | st.just("..."), max_size=4)
keys = st.sampled_from(CASE_KEYS) | st.sampled_from(["name", "tags", "expect", "shape", "kernel_table_sha256"])
tables = st.dictionaries(keys | st.text(max_size=6), values, max_size=3)
sound_tables = st.fixed_dictionaries(
    {},
    optional={
        "limit": st.sampled_from(["off", 1, "max-recv+1", "sum"]),
        "tokens": st.sampled_from([1, [0, 1, "..."], [3, 4]]),
        "seed": st.integers(0, 3),
        "policy": st.sampled_from(["strict", "guard"]),
        "ep_size": st.integers(1, 4),
    },
)
sound_axes = st.fixed_dictionaries(
    {},
    optional={
        "limit": st.lists(st.sampled_from(["off", 1, "max-recv", "capacity+1"]), min_size=1, max_size=3),
        "shape": st.lists(
            st.sampled_from([{"tokens": 3}, {"tokens": [0, 2, "..."], "seed": 1}]), min_size=1, max_size=2
        ),
        "topk": st.lists(st.integers(1, 4), min_size=1, max_size=3),
    },
)
sound_suites = st.fixed_dictionaries(
    {"defaults": st.just({"model": "tiny"})},
    optional={
        "name": st.sampled_from(["a", "b c"]),
        "tags": st.lists(st.sampled_from(["x", "y"]), max_size=2),
        "axes": sound_axes,
        "include": st.lists(sound_tables, max_size=3),
        "exclude": st.lists(sound_tables, max_size=2),
        "expect": st.lists(st.fixed_dictionaries({"verdict": st.just("DRIFT"), "match": sound_tables}), max_size=2),
    },
)
wild_suites = st.dictionaries(
    st.sampled_from(["name", "description", "tags", "defaults", "axes", "include", "exclude", "expect"])
    | st.text(max_size=4),
    st.one_of(
        tables,
        st.lists(tables, max_size=3),
        st.dictionaries(keys, st.lists(values | tables, max_size=3), max_size=3),
        values,
    ),
    max_size=5,
)


class ByteEdit(NamedTuple):
    """Replace some bytes by others; `where` is a fraction of the length."""

    where: float
    removed: int
    put: bytes

    def __call__(self, content: bytes) -> bytes:
        start = int(self.where * len(content))
        return content[:start] + self.put + content[start + self.removed :]


class ValueEdit(NamedTuple):
    """Replace one value by another."""

    number: int
    put: bytes

    def __call__(self, content: bytes) -> bytes:
        found = list(re.finditer(rb'"[^"\n]*"|\b\d+\b|true|false', content))
        if not found:
            return content
        start, end = found[self.number % len(found)].span()
        return content[:start] + self.put + content[end:]


Edits = list[ByteEdit | ValueEdit]


literals = st.one_of(
    st.sampled_from([b"0", b"-1", b"1", b"999999999999", b"true", b"1.5", b"[]", b"{}", b'""', b'"off"', b'"sum"']),
    st.sampled_from([b'"max-recv-2"', b'"capacity+3"', b'"guard"', b'"tiny-odd"', b'"..."', b"[1, 2]", b"{seed = 1}"]),
    st.integers(-2, 70).map(lambda number: str(number).encode()),
)
fragments = st.one_of(
    st.binary(max_size=3),
    st.sampled_from([b'"', b"'", b"[", b"]", b"{", b"}", b"=", b"\n", b",", b".", b"#", b"-", b"_", b"\\u12", b'"""']),
    st.sampled_from([b"\0", b"\xff", b"\xc3\xa9", b"\xe2\x80\xa8", b"\r", b"0x", b"9" * 20, b"nan", b"1e400", b"true"]),
    st.sampled_from([b"1979-05-27", b'"..."', b"[[include]]\n", b"[axes]\n", b"limit", b"tokens", b"expect", b"name"]),
)
byte_edits = st.builds(ByteEdit, st.floats(0, 1), st.integers(0, 4), fragments)
value_edits = st.builds(ValueEdit, st.integers(0, 60), literals)
edits = st.lists(value_edits | byte_edits, min_size=1, max_size=4)


def outcome(work: Callable[[], Suite | Case]) -> Suite | Case | None:
    """Return the result of `work`, or None if it refuses in one line; any other end fails the test."""
    refused = ""
    try:
        return work()
    except (InvalidCase, Overflow) as error:
        refused = str(error)
    assert len(refused.splitlines()) == 1
    return None


def check_suite(file: Path, ep_size: int) -> None:
    suite = outcome(lambda: load_suite(str(file), ep_size))
    if isinstance(suite, Suite):
        assert suite.entries
        assert len({entry.name for entry in suite.entries}) == len(suite.entries)
        assert all(len(entry.case.tokens) == entry.case.ep_size <= ep_size for entry in suite.entries)
        assert all(len(entry.name.splitlines()) == 1 for entry in suite.entries)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(table=sound_suites | wild_suites, ep_size=st.integers(1, 8))
def test_any_table_gives_a_suite_or_a_one_line_error(folder: Path, table: dict[str, Any], ep_size: int) -> None:
    file = folder / "table.json"
    file.write_bytes(msgspec.json.encode(table))
    check_suite(file, ep_size)


@fuzz
@given(content=st.sampled_from(BUILTIN), changes=edits, ep_size=st.integers(1, 8))
def test_damaged_built_in_suite_is_read_or_refused_in_one_line(
    folder: Path, content: bytes, changes: Edits, ep_size: int
) -> None:
    file = folder / "suite.toml"
    file.write_bytes(reduce(lambda damaged, edit: edit(damaged), changes, content))
    check_suite(file, ep_size)


@fuzz
@given(changes=edits, suffix=st.sampled_from(["toml", "json"]), ep_size=st.none() | st.integers(1, 8))
def test_damaged_case_file_is_read_or_refused_in_one_line(
    folder: Path, changes: Edits, suffix: str, ep_size: int | None
) -> None:
    content = CASE_FILE if suffix == "toml" else msgspec.json.encode(msgspec.toml.decode(CASE_FILE))
    file = folder / f"case.{suffix}"
    file.write_bytes(reduce(lambda damaged, edit: edit(damaged), changes, content))
    outcome(lambda: resolve_case([load_case_file(str(file))], ep_size).case)


def told(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command that starts no ranks."""
    said = io.StringIO()
    ended = Unsupported("a valid case") if arguments[0] == "run" else [Summary()]
    with (
        patch("distbench.cli.launching.Bench.run", side_effect=ended),
        patch("distbench.report.console.print_summary"),
        contextlib.redirect_stderr(said),
    ):
        return main(arguments), said.getvalue()


@sample
@given(content=st.sampled_from(BUILTIN), changes=edits, ranks=st.integers(1, 8))
def test_suite_command_refuses_a_damaged_suite_in_one_line(
    folder: Path, content: bytes, changes: Edits, ranks: int
) -> None:
    file = folder / "command.toml"
    file.write_bytes(reduce(lambda damaged, edit: edit(damaged), changes, content))
    code, said = told("suite", str(file), f"--nproc={ranks}", "--quiet", f"--out={folder / 'out'}")
    lines = [line for line in said.splitlines() if not NOTE.match(line)]
    assert code in (0, 2, 77)
    assert len(lines) == (code > 0)
    assert all(re.match(r"distbench: (INVALID|UNSUPPORTED|OVERFLOW): \S", line) for line in lines)


@sample
@given(changes=edits, suffix=st.sampled_from(["toml", "json"]), ranks=st.integers(1, 8))
def test_run_command_refuses_a_damaged_case_file_in_one_line(
    folder: Path, changes: Edits, suffix: str, ranks: int
) -> None:
    content = CASE_FILE if suffix == "toml" else msgspec.json.encode(msgspec.toml.decode(CASE_FILE))
    file = folder / f"command.{suffix}"
    file.write_bytes(reduce(lambda damaged, edit: edit(damaged), changes, content))
    code, said = told("run", f"--case={file}", f"--nproc={ranks}", f"--out={folder / 'run'}")
    *_, last = said.splitlines()
    assert (code == 2 and said.count("\n") == 1) or (code == 77 and last.startswith("distbench: UNSUPPORTED: "))
    assert re.match(r"distbench: (INVALID|UNSUPPORTED|starting)", said)


@pytest.mark.parametrize("command", [("suite",), ("run", "--case")])
def test_case_file_that_is_a_pipe_without_a_writer_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    code, said = told(*command, str(tmp_path / "pipe.toml"), f"--out={tmp_path}")
    assert code == 2
    assert "pipe.toml: cannot be read (not a regular file); give a readable .toml or .json file" in said.replace(
        "'", ""
    )


@fuzz
@given(content=st.binary(max_size=64), suffix=st.sampled_from(["toml", "json"]))
def test_any_bytes_give_a_suite_or_a_one_line_error(folder: Path, content: bytes, suffix: str) -> None:
    file = folder / f"bytes.{suffix}"
    file.write_bytes(content)
    check_suite(file, 2)
    outcome(lambda: resolve_case([load_case_file(str(file))], 2).case)


@fuzz
@given(
    expression=st.text(alphabet="!~=,*?[]-#ab limtosek\n", max_size=24) | st.text(max_size=12),
    flag=st.sampled_from(CASE_KEYS),
    text=st.text(max_size=8) | st.sampled_from(["1", "off", "1,2,...", "true", "\udcff", "9" * 5000]),
)
def test_any_select_and_override_are_accepted_or_refused_in_one_line(expression: str, flag: str, text: str) -> None:
    suite = outcome(lambda: load_suite("smoke", 2, [Layer("flag", {flag: text}, strict=False)]))
    if isinstance(suite, Suite):
        outcome(lambda: msgspec.structs.replace(suite, entries=select(suite.entries, expression)))
