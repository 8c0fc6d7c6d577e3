"""A bundle shows by itself what the run showed, and holds what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from distbench.bundle.analysis import analyse
from distbench.bundle.findings import SUM
from distbench.bundle.layout import MAX_TOKENS, part_name
from distbench.bundle.read import Bundle, open_bundle, read_part, runnable_case
from distbench.bundle.write import write_parts
from distbench.case import Case
from distbench.errors import Verdict
from distbench.rank import run_case
from distbench.recording import Recorder
from distbench.session import Session
from tests.cases import tiny_case
from tests.distributed.bundles import leave_bundle, run_healthy
from tests.distributed.faults import ARM_CALLS, FAULTS, run_with_fault, run_with_weights_of_another_expert
from tests.ranks import on_ranks

RANK = 2
FP8 = tiny_case(dispatch_dtype="fp8")
FNUZ = tiny_case(dispatch_dtype="fp8", fp8_format="e4m3fnuz")
SINGLE_FAULTS = [(stage, fault) for stage, faults in FAULTS.items() for fault in faults]


def tensors_of(bundle: Bundle, rank: int) -> dict[str, Any]:
    part = bundle.manifest.recorded.parts[rank]
    return load(read_part(bundle, part).content)


@pytest.mark.parametrize(("stage", "fault"), SINGLE_FAULTS)
def test_the_recording_alone_gives_verdict_stage_rank_and_diagnosis(stage: str, fault: str, tmp_path: Path) -> None:
    number = SINGLE_FAULTS.index((stage, fault))
    arm, case = ARM_CALLS[number % 4], (tiny_case(), FP8, FNUZ)[number % 3]
    outcome = leave_bundle(tmp_path, run_with_fault, case, stage, fault, arm, RANK)
    bundle = open_bundle(tmp_path)
    assert runnable_case(bundle).fp8_format == case.fp8_format
    analysis = analyse(bundle)
    assert analysis.trusted
    assert analysis.judgement is not None
    first, then = analysis.judgement.first_divergence, outcome.judgement.first_divergence
    assert analysis.confirms(outcome.judgement.verdict, [found.cause for found in outcome.diagnosis])
    assert first is not None
    assert then is not None
    assert (first.stage, first.arm, first.rank) == (then.stage, then.arm, then.rank)
    damaged_sum = [found for found in analysis.findings if found.stage == SUM and found.wrong]
    assert {found.rank for found in damaged_sum} == ({RANK} if stage == "combine" else set())


def test_a_gaussian_case_is_held_against_its_padded_arm(tmp_path: Path) -> None:
    case = tiny_case(numerics="gaussian", kernel_table="tests/data/splitk.csv", routing="duplicates")
    leave_bundle(tmp_path, run_with_fault, case, "dispatch", "flip a sign", "truncated", RANK)
    bundle = open_bundle(tmp_path)
    assert analyse(bundle).confirms(Verdict.CORRUPT, [found.cause for found in bundle.report.diagnosis])
    assert (tmp_path / "kernel_table.csv").read_bytes() == Path("tests/data/splitk.csv").read_bytes()


@pytest.mark.parametrize("kernel", ["", "IntraNodeLL", "InterNodeV1"])
def test_a_wrong_sum_of_gaussian_rows_is_seen_in_the_recording(kernel: str, tmp_path: Path) -> None:
    mori: dict[str, Any] = {"transport": "mori", "emulate": True, "mori_kernel": kernel} if kernel else {}
    nodes: dict[str, Any] = {"gpu_per_node": 2} if kernel.startswith("Inter") else {}
    drift: dict[str, Any] = {"numerics": "gaussian", "kernel_table": "tests/data/splitk.csv", "routing": "duplicates"}
    case = tiny_case(**drift, **mori, **nodes)
    leave_bundle(tmp_path, run_with_fault, case, "combine", "flip the lowest bit of a token", "truncated", RANK)
    bundle = open_bundle(tmp_path)
    analysis = analyse(bundle)
    assert bundle.report.verdict is Verdict.CORRUPT
    assert analysis.confirms(Verdict.CORRUPT, [found.cause for found in bundle.report.diagnosis])
    wrong = {(found.rank, found.arm) for found in analysis.findings if found.stage == SUM and found.wrong}
    assert wrong == {(RANK, "truncated")}


def test_wrong_weights_are_seen_in_the_expert_rows(tmp_path: Path) -> None:
    leave_bundle(tmp_path, run_with_weights_of_another_expert, tiny_case(), RANK)
    analysis = analyse(open_bundle(tmp_path))
    wrong = {(found.stage, found.rank) for found in analysis.findings if found.wrong and found.arm == "padded"}
    assert ("experts", RANK) in wrong
    assert not any(stage == "dispatch" for stage, _ in wrong)


def test_a_part_that_is_elsewhere_is_named_and_nothing_is_confirmed(tmp_path: Path) -> None:
    outcome = leave_bundle(tmp_path, run_with_fault, tiny_case(), "experts", "drop a contribution", "control", RANK)
    (tmp_path / part_name(1)).unlink()
    analysis = analyse(open_bundle(tmp_path))
    assert "rank-00001" in analysis.missing[0]
    assert not analysis.confirms(outcome.judgement.verdict, [found.cause for found in outcome.diagnosis])


def test_parts_hold_failing_tokens_only_and_the_routing_of_all(tmp_path: Path) -> None:
    case = tiny_case(tokens=40, limit="max-recv-1", policy="unchecked")
    leave_bundle(tmp_path, run_healthy, case)
    bundle = open_bundle(tmp_path)
    listed = set(bundle.manifest.recorded.tokens)
    assert 0 < len(listed) < 8
    for rank in range(4):
        tensors = tensors_of(bundle, rank)
        assert tensors["routing"].shape == (40, case.topk)
        assert {(rank, token) for token in tensors["token.index"].tolist()} <= listed
        assert {tuple(source) for source in tensors["padded.sources"].tolist()} <= listed
        digests = read_part(bundle, bundle.manifest.recorded.parts[rank]).digests
        assert {"w1", "w2", "token.hidden", "padded.experts", "truncated.hidden", "combined.oracle"} <= set(digests)


def test_more_failing_tokens_than_fit_are_counted(tmp_path: Path) -> None:
    case = tiny_case(tokens=64, limit="1", policy="unchecked")
    leave_bundle(tmp_path, run_healthy, case)
    recorded = open_bundle(tmp_path).manifest.recorded
    assert len(recorded.tokens) == MAX_TOKENS
    assert recorded.left_out > 0
    assert analyse(open_bundle(tmp_path)).confirms(
        Verdict.UNDER_LIMIT, [found.cause for found in open_bundle(tmp_path).report.diagnosis]
    )


def passed(session: Session, folder: Path, case: Case) -> bool:
    recorder = Recorder()
    run_case(session, case, recorder)
    return write_parts(session, recorder, folder, None) is None


def test_a_case_that_passes_leaves_nothing(tmp_path: Path) -> None:
    assert on_ranks(4, passed, tmp_path / "bundle", tiny_case()) == [True] * 4
    assert not (tmp_path / "bundle").exists()


def test_the_kept_repeat_is_the_recorded_one(tmp_path: Path) -> None:
    case = tiny_case(repeats=3)
    outcome = leave_bundle(tmp_path, run_with_fault, case, "experts", "double a contribution", "truncated", RANK)
    causes = [found.cause for found in outcome.diagnosis]
    assert analyse(open_bundle(tmp_path)).confirms(Verdict.CORRUPT, causes)


def test_a_refused_case_has_no_parts(tmp_path: Path) -> None:
    case = tiny_case(tokens=65)
    outcome = leave_bundle(tmp_path, run_healthy, case)
    bundle = open_bundle(tmp_path)
    assert outcome.judgement.verdict is Verdict.OVERFLOW
    assert bundle.manifest.recorded.parts == []
    assert analyse(bundle).judgement is None
