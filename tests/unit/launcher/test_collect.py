"""`distbench collect`: verdicts from the files of ranks, also in a moved folder."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from distbench.case.entry import Entry
from distbench.case.stages import Stage
from distbench.cli.main import main
from distbench.distributed.heartbeat import Heartbeat
from distbench.launcher.job import Job, clear_ranks, heartbeat_path, job_path
from distbench.report.journal import JournalReader
from tests.cases import tiny_case

RANKS = 3


def left(out: Path, stages: dict[int, str], **values: object) -> Path:
    """Write the files of torchrun ranks that ended in these stages of a case of two ranks."""
    entry = Entry(name="small", case=tiny_case(2), sources={})
    job = Job(entries=(entry,), out="as/typed", supervised=False, started=RANKS)
    clear_ranks(out)
    job_path(out).write_bytes(msgspec.json.encode(msgspec.structs.replace(job, **values)))
    with patch("distbench.distributed.heartbeat.pid_space", return_value=1):  # of another host
        for rank, stage in stages.items():
            written = Heartbeat(heartbeat_path(out, rank))
            written.mark(Stage(stage))
            written.close()
    return out


def test_collect_works_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    out = left(tmp_path, {0: "done", 1: "dispatch", 2: "done"})
    assert main(["collect", str(out)]) == 3
    assert [line.verdict.value for line in JournalReader(out).new_lines()] == ["RANK_FAULT"]


def test_collect_examines_ranks_beyond_those_of_the_largest_case(tmp_path: Path) -> None:
    out = left(tmp_path, {0: "done", 1: "done", 2: "start"})
    assert main(["collect", str(out)]) == 3
    (line,) = JournalReader(out).new_lines()
    assert line.verdict.value == "RANK_FAULT"


def test_collect_refuses_a_supervised_run_and_keeps_its_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = left(tmp_path, {0: "done", 1: "done"}, supervised=True, started=0)
    (out / "summary.json").write_text("kept")
    assert main(["collect", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"distbench: INVALID: {out}: its verdicts are complete")
    assert (out / "summary.json").read_text() == "kept"
