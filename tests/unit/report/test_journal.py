"""The journal: readers see whole lines only, a torn last line is removed, and damage is refused with its line."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.case.entry import Entry
from distbench.errors import InvalidCase, Verdict
from distbench.report.document import build_report
from distbench.report.environment import Environment
from distbench.report.journal import RESULTS, Journal, JournalReader, filter_journal, repair_journal
from distbench.report.schema import Report
from distbench.verify.records import Judgement, Outcome, Reason
from tests.cases import tiny_case

BLOCK_BYTES = 64 << 10
LINES = 4


def report(seed: int, verdict: Verdict = Verdict.INVALID) -> Report:
    """Report of a refused case."""
    case = tiny_case(2, seed=seed)
    reasons = [Reason(code="invalid", message=f"line one\nline two of {seed}")]
    outcome = Outcome(case, Judgement(verdict, reasons, None))
    environment = Environment(hosts=[], devices=[], versions={}, commits={}, variables={})
    entry = Entry(name=f"case {seed}", case=case, sources={}, expect="INVALID")
    return build_report(entry, outcome, environment=environment, wall_s=0.5)


WHOLE = b"".join(msgspec.json.encode(report(seed)) + b"\n" for seed in range(LINES))
ENDS = [position + 1 for position, byte in enumerate(WHOLE) if byte == ord("\n")]
CUTS = st.integers(0, len(WHOLE)) | st.sampled_from([end + by for end in ENDS for by in (-1, 0, 1)][:-1])


def names(reader: JournalReader) -> list[str]:
    return [line.name for line in reader.new_lines()]


def expected(count: int) -> list[str]:
    return [f"case {seed}" for seed in range(count)]


def append(out: Path, *reports: Report) -> None:
    journal = Journal(out)
    for one in reports:
        journal.append(one)
    journal.close()


def test_appended_report_is_read_once(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path)
    assert names(reader) == []
    journal = Journal(tmp_path)
    for seed in range(LINES):
        journal.append(report(seed))
        assert names(reader) == [f"case {seed}"]
    assert names(reader) == []
    journal.close()
    (first, *_) = JournalReader(tmp_path).new_lines()
    assert (first.verdict, first.as_expected, first.exit_code) == (Verdict.INVALID, True, 2)
    assert (len(first.case.hash), first.timing.wall_s) == (64, 0.5)


@given(cuts=st.lists(CUTS, max_size=6))
def test_concurrent_reader_sees_whole_lines_only(tmp_path_factory: pytest.TempPathFactory, cuts: Sequence[int]) -> None:
    out = tmp_path_factory.mktemp("out")
    reader, seen = JournalReader(out), []
    for cut in (*sorted(cuts), len(WHOLE)):
        (out / RESULTS).write_bytes(WHOLE[:cut])
        seen += names(reader)
        assert seen == expected(sum(end <= cut for end in ENDS))
    assert seen == expected(LINES)


@given(cut=CUTS)
def test_torn_last_line_is_removed_and_the_next_append_is_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    out = tmp_path_factory.mktemp("out")
    (out / RESULTS).write_bytes(WHOLE[:cut])
    left = sum(end <= cut for end in ENDS)
    repair_journal(out)
    assert (out / RESULTS).read_bytes() == WHOLE[: ([0, *ENDS])[left]]
    assert names(JournalReader(out)) == expected(left)
    (out / RESULTS).write_bytes(WHOLE[:cut])
    append(out, report(9))
    assert names(JournalReader(out)) == [*expected(left), "case 9"]


@pytest.mark.parametrize("torn", [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES])
@pytest.mark.parametrize("whole", [b"", WHOLE])
def test_torn_last_line_of_any_length_is_removed(tmp_path: Path, whole: bytes, torn: int) -> None:
    (tmp_path / RESULTS).write_bytes(whole + b"x" * torn)
    repair_journal(tmp_path)
    assert (tmp_path / RESULTS).read_bytes() == whole


def test_repair_leaves_a_missing_or_whole_journal_unchanged(tmp_path: Path) -> None:
    repair_journal(tmp_path)
    assert not (tmp_path / RESULTS).exists()
    (tmp_path / RESULTS).write_bytes(WHOLE)
    repair_journal(tmp_path)
    assert (tmp_path / RESULTS).read_bytes() == WHOLE


@pytest.mark.parametrize(
    "damage",
    [b"", b"{}", b"null", b"\x00" * 40, b"\xff\xfe", b"[" * 100_000, ENDS[0] * b" ", WHOLE[: ENDS[0] // 2]],
)
@pytest.mark.parametrize("number", [1, 3])
def test_damage_in_a_whole_line_is_refused_with_its_number(tmp_path: Path, damage: bytes, number: int) -> None:
    before = WHOLE[: ([0, *ENDS])[number - 1]]
    (tmp_path / RESULTS).write_bytes(before + damage + b"\n" + WHOLE)
    with pytest.raises(InvalidCase, match=re.escape(f"{tmp_path / RESULTS}, line {number}: ")) as caught:
        names(JournalReader(tmp_path))
    assert "\n" not in str(caught.value)
    assert "--rerun all" in str(caught.value)


def test_journal_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_bytes(WHOLE.replace(b"distbench.report/1", b"distbench.report/0", 1))
    with pytest.raises(InvalidCase, match=r"line 1: schema 'distbench.report/0', known is distbench.report/1"):
        names(JournalReader(tmp_path))


def test_filter_keeps_lines_byte_for_byte_and_drops_duplicates(tmp_path: Path) -> None:
    lines = WHOLE.splitlines(keepends=True)
    (tmp_path / RESULTS).write_bytes(WHOLE + lines[0] + b'{"torn')
    filter_journal(tmp_path, lambda line: line.name != "case 2")
    assert (tmp_path / RESULTS).read_bytes() == lines[0] + lines[1] + lines[3]
    filter_journal(tmp_path / "nowhere", lambda _: True)


def test_directory_of_a_new_journal_is_synced_before_its_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    append(tmp_path, report(0))
    assert synced == [tmp_path.stat().st_ino, (tmp_path / RESULTS).stat().st_ino]
    synced.clear()
    append(tmp_path, report(1))
    assert synced == [(tmp_path / RESULTS).stat().st_ino]
    synced.clear()
    filter_journal(tmp_path, lambda line: line.name != "case 0")
    assert synced == [(tmp_path / RESULTS).stat().st_ino, tmp_path.stat().st_ino]


def test_write_error_names_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path / RESULTS}'")):
        append(tmp_path, report(0))


def test_second_writer_waits_for_the_lock_of_the_first(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    second = threading.Thread(target=append, args=(tmp_path, report(1)))
    second.start()
    time.sleep(0.2)
    first.append(report(0))
    first.close()
    second.join()
    assert names(JournalReader(tmp_path)) == expected(2)


def test_open_journal_holds_the_file_lock(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with (tmp_path / RESULTS).open("rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        journal.close()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
