"""All tuned tables of a release: the wheel's own, and those of a folder that DISTBENCH_AITER_CONFIGS names.

git clone --depth 1 https://github.com/ROCm/aiter /tmp/aiter
DISTBENCH_AITER_CONFIGS=/tmp/aiter/aiter/configs pytest tests/contract/test_aiter_tables.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distbench.experts.selection.releases import CURRENT, rules_for
from distbench.tools.table_survey import survey_tables
from tests.contract.wheels import aiter_wheel

VERSION = "0.1.7.post2.dev18"
FOLDER = os.environ.get("DISTBENCH_AITER_CONFIGS", "")


def test_all_but_three_rows_of_the_wheels_table_are_selected_by_some_layer(tmp_path: Path) -> None:
    with aiter_wheel(VERSION) as wheel:
        (tmp_path / "tuned_fmoe.csv").write_bytes(wheel.read("aiter/configs/tuned_fmoe.csv"))
    (own,) = survey_tables(tmp_path, rules_for(VERSION))
    assert (own.rows, own.kernels, own.run, own.refused) == (773, 770, 105, "")
    assert own.unreached == {"for a bucket that the release does not have": 3}
    (newest,) = survey_tables(tmp_path, CURRENT)
    assert (newest.kernels, newest.run, sum(newest.unreached.values())) == (404, 113, 369)


@pytest.mark.skipif(not FOLDER, reason="DISTBENCH_AITER_CONFIGS names no folder of tables")
def test_every_table_in_a_folder_is_read_or_refused_with_its_name() -> None:
    found = survey_tables(Path(FOLDER), CURRENT)
    assert found, f"no fmoe table below {FOLDER}"
    for one in found:
        lost = sum(one.unreached.values())
        assert one.refused or one.kernels + lost == one.rows
        assert one.refused or one.kernels, f"{one.table}: no row is reached"
        assert one.refused == "" or one.table in one.refused
