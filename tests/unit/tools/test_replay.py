"""Conditions under which a replay counts as reproduced."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from distbench.errors import Verdict
from distbench.report.schema import RankReport, Report
from distbench.tools.replay import compare
from distbench.verify.records import Divergence, Reason
from distbench.workload.version import INPUTS_VERSION
from tests.cases import tiny_case
from tests.reports import report_of

CASE = tiny_case()


def lost(rank: int | None, stage: str, verdict: Verdict = Verdict.RANK_FAULT) -> Report:
    reason = Reason(code="rank-fault", rank=rank, stage=stage, message="made up")
    return replace(report_of(CASE, ""), verdict=verdict, reasons=[reason])


def diverged(arm: str, rank: int) -> Report:
    first = Divergence(stage="combine", arm=arm, rank=rank, field="tokens", against="oracle", rows=1)
    return replace(report_of(CASE, "combine: zeros"), first_divergence=first)


def differing(recorded: Report, here: Report) -> list[str]:
    replay = compare(recorded, here)
    assert replay.reproduced is not bool(replay.differences)
    return [one.what for one in replay.differences]


@pytest.mark.parametrize("verdict", [Verdict.RANK_FAULT, Verdict.HANG])
def test_loss_of_another_rank_does_not_reproduce(verdict: Verdict) -> None:
    recorded = lost(2, "experts", verdict)
    assert differing(recorded, lost(2, "experts", verdict)) == []
    assert differing(recorded, lost(3, "experts", verdict)) == ["first wrong place"]
    assert differing(recorded, lost(None, "experts", verdict)) == ["first wrong place"]
    assert differing(recorded, lost(2, "combine", verdict)) == ["ending", "first wrong place"]


def test_divergence_in_another_arm_or_rank_does_not_reproduce() -> None:
    recorded = diverged("padded", 1)
    assert differing(recorded, diverged("padded", 1)) == []
    assert differing(recorded, diverged("padded", 2)) == ["first wrong place"]
    assert differing(recorded, diverged("truncated", 1)) == ["first wrong place"]


def test_divergence_in_only_one_of_two_reports_is_a_difference() -> None:
    without = replace(diverged("padded", 1), first_divergence=None)
    assert "first wrong place" in differing(diverged("padded", 1), without)
    assert "first wrong place" in differing(without, diverged("padded", 1))


def with_bits(digest: str, version: int = INPUTS_VERSION) -> Report:
    rank = RankReport(
        rank=0,
        host="here",
        device="cpu",
        tokens=1,
        total_recv=1,
        capacity=1,
        limit=None,
        lost_rows=0,
        kernels={},
        digests={"padded": digest},
        peak_bytes=0,
        packages={},
    )
    return replace(report_of(CASE, ""), ranks=[rank], inputs_version=version)


@pytest.mark.parametrize(
    ("version", "expected"), [(INPUTS_VERSION, ["bits of padded"]), (1, ["version of the inputs"])]
)
def test_bits_are_compared_where_inputs_are_the_same(version: int, expected: list[str]) -> None:
    replay = compare(with_bits("aa", version), with_bits("bb"))
    assert [one.what for one in replay.differences] == expected
    assert replay.reproduced


def test_a_case_that_passes_is_reproduced_by_one_that_passes() -> None:
    assert differing(report_of(CASE, ""), report_of(CASE, "")) == []
