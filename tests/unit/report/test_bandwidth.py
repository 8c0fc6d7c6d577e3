"""Bandwidth of stages: bytes of the fullest rank per median, with and without its own rows."""

from __future__ import annotations

import msgspec
import pytest

from distbench.report.bandwidth import bandwidth_of, shown
from distbench.report.schema import Report
from distbench.verify.records import SentRows
from tests.cases import tiny_case
from tests.reports import report_of

SENT = [[5, 10], [3, 30]]
"""Rank 1 is the fullest: 40 rows, 30 of them its own."""


def report(rows: list[list[int]] = SENT, ranks_per_block: int = 1) -> Report:
    sent = SentRows(ranks_per_block=ranks_per_block, rows=rows)
    method = {"dispatch_bytes": 40_000, "combine_bytes": 80_000}
    return msgspec.structs.replace(report_of(tiny_case(2), ""), method=method, sent=sent)


@pytest.mark.parametrize(("stage", "algorithm"), [("dispatch", 4.0), ("combine", 8.0)])
def test_bandwidth_is_the_bytes_of_the_fullest_rank_per_median(stage: str, algorithm: float) -> None:
    found = bandwidth_of(report(), stage, 10.0)
    assert found is not None
    assert found.algorithm == pytest.approx(algorithm)
    assert found.bus == pytest.approx(algorithm * 10 / 40)


def test_bus_of_uniform_routing_is_that_of_nccl_tests() -> None:
    ranks = 4
    found = bandwidth_of(report([[7] * ranks] * ranks), "dispatch", 10.0)
    assert found is not None
    assert found.bus == pytest.approx(found.algorithm * (ranks - 1) / ranks)


def test_stage_that_moves_no_rows_or_has_no_time_has_no_bandwidth() -> None:
    assert bandwidth_of(report(), "experts", 10.0) is None
    assert bandwidth_of(report(), "dispatch", None) is None
    assert bandwidth_of(report(), "dispatch", 0.0) is None
    assert bandwidth_of(report_of(tiny_case(2), ""), "dispatch", 10.0) is None


@pytest.mark.parametrize(
    "made",
    [report(ranks_per_block=8), *map(report, ([[0, 0], [0, 0]], [], [[5, 10], [3]], [[1, 2]]))],
)
def test_bus_is_unknown_without_the_rows_of_single_ranks(made: Report) -> None:
    found = bandwidth_of(made, "dispatch", 10.0)
    assert found is not None
    assert found.cells() == ("4", "-")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.00123456, "0.00123"), (412.34, "412"), (1234.5, "1234"), (999.6, "1000")]
)
def test_bandwidth_is_shown_with_three_digits(value: float | None, text: str) -> None:
    assert shown(value) == text
