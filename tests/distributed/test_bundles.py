"""A bundle alone reproduces the verdict of its run, and its contents match its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load

from distbench.case.entry import Entry
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import InvalidCase, Verdict
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.recorder import Recorder
from distbench.pipeline.run_case import run_case
from distbench.report.bundle import manifest as manifest_module
from distbench.report.bundle import write as write_module
from distbench.report.bundle.analysis import analyse
from distbench.report.bundle.findings import SENT, SUM
from distbench.report.bundle.layout import MANIFEST, MAX_TOKENS, REPORT, part_name
from distbench.report.bundle.manifest import write_manifest
from distbench.report.bundle.read import Bundle, open_bundle, read_part, runnable_case
from distbench.report.bundle.write import write_parts, write_routing
from distbench.report.document import build_report
from distbench.report.environment import capture_environment
from distbench.verify.records import LISTED_TOKENS, Evidence, Judgement, Outcome
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload
from distbench.workload.version import INPUTS_VERSION
from tests.cases import tiny_case
from tests.distributed.bundles import leave_bundle, run_healthy
from tests.distributed.faults import ARM_CALLS, FAULTS, run_with_fault, run_with_weights_of_another_expert
from tests.ranks import on_ranks

RANK = 2
CPU = torch.device("cpu")
FP8 = tiny_case(dispatch_dtype="fp8")
FNUZ = tiny_case(dispatch_dtype="fp8", fp8_format="e4m3fnuz")
BROUGHT = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "numerics": "exact", "tokens": (3, 5)}
SINGLE_FAULTS = [(stage, fault) for stage, faults in FAULTS.items() for fault in faults]


def tensors_of(bundle: Bundle, rank: int) -> dict[str, Any]:
    part = bundle.manifest.recorded.parts[rank]
    return load(read_part(bundle, part).content)


@pytest.mark.parametrize(("stage", "fault"), SINGLE_FAULTS)
def test_bundle_alone_reproduces_verdict_stage_rank_and_diagnosis(stage: str, fault: str, tmp_path: Path) -> None:
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


def brought(transport: str) -> Case:
    return resolve_case([Layer(FLAGS, {**BROUGHT, "transport": f"tests.brought_plugins:{transport}"})], 2).case


def test_tokens_that_a_transport_overwrote_are_confirmed_as_such(tmp_path: Path) -> None:
    outcome = leave_bundle(tmp_path, run_healthy, brought("ZeroesSent"))
    analysis = analyse(open_bundle(tmp_path))
    assert {found.rank for found in analysis.findings if found.stage == SENT} == {1}
    assert analysis.confirms(outcome.judgement.verdict, [found.cause for found in outcome.diagnosis])


def test_slots_that_a_transport_does_not_move_are_not_damage(tmp_path: Path) -> None:
    outcome = leave_bundle(tmp_path, run_healthy, brought("LocalSlots"))
    assert outcome.judgement.first_divergence is not None
    assert outcome.judgement.first_divergence.stage == "combine"
    analysis = analyse(open_bundle(tmp_path))
    assert {found.stage for found in analysis.findings if found.wrong} == {"combine", SUM}
    assert analysis.confirms(outcome.judgement.verdict, [found.cause for found in outcome.diagnosis])


def negated(batch: TokenBatch) -> TokenBatch:
    return batch._replace(hidden=-batch.hidden)


def test_tokens_that_no_rank_saw_change_are_of_other_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_bundle(tmp_path, run_with_fault, tiny_case(), "combine", next(iter(FAULTS["combine"])), "padded", RANK)
    tokens, token_rows = Workload.tokens, Workload.token_rows
    monkeypatch.setattr(Workload, "tokens", lambda *given: negated(tokens(*given)))
    assert analyse(open_bundle(tmp_path)).trusted, "what was received is generated here, and what was sent is not"
    monkeypatch.setattr(Workload, "tokens", tokens)
    monkeypatch.setattr(Workload, "token_rows", lambda *given: negated(token_rows(*given)))
    assert not analyse(open_bundle(tmp_path)).trusted


def of_other_inputs(folder: Path, version: int) -> Bundle:
    """Label a bundle's inputs as those of another version."""
    for name in (MANIFEST, REPORT):
        content = json.loads((folder / name).read_text())
        assert content["inputs_version"] == INPUTS_VERSION
        (folder / name).write_text(json.dumps(content | {"inputs_version": version}))
    return open_bundle(folder)


@pytest.mark.parametrize(
    ("case", "version"),
    [
        (tiny_case(), INPUTS_VERSION - 1),
        (FP8, INPUTS_VERSION + 1),
        (FNUZ, INPUTS_VERSION - 1),
        (tiny_case(numerics="gaussian"), INPUTS_VERSION - 1),
    ],
    ids=["bf16", "fp8", "fnuz", "gaussian"],
)
@pytest.mark.parametrize("stage", FAULTS)
def test_bundle_of_other_inputs_is_judged_by_its_recorded_ones(
    stage: str, case: Case, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = leave_bundle(tmp_path, run_with_fault, case, stage, next(iter(FAULTS[stage])), "truncated", RANK)
    bundle = of_other_inputs(tmp_path, version)
    monkeypatch.setattr(Workload, "__init__", lambda *_, **__: pytest.fail("inputs were generated"))
    analysis = analyse(bundle)
    assert analysis.confirms(outcome.judgement.verdict, [found.cause for found in outcome.diagnosis])
    others = [found for found in analysis.findings if found.arm != "truncated"]
    assert not any(found.wrong for found in others if case.numerics == "exact" or found.stage != "experts")
    assert any(found.wrong for found in analysis.findings if found.rank == RANK)


def test_bundle_of_a_gaussian_case_is_compared_with_its_padded_arm(tmp_path: Path) -> None:
    case = tiny_case(numerics="gaussian", kernel_table="tests/data/splitk.csv", routing="duplicates")
    leave_bundle(tmp_path, run_with_fault, case, "dispatch", "flip a sign", "truncated", RANK)
    bundle = open_bundle(tmp_path)
    assert analyse(bundle).confirms(Verdict.CORRUPT, [found.cause for found in bundle.report.diagnosis])
    assert (tmp_path / "kernel_table.csv").read_bytes() == Path("tests/data/splitk.csv").read_bytes()


@pytest.mark.parametrize("kernel", ["", "IntraNodeLL", "InterNodeV1"])
def test_wrong_sum_of_gaussian_rows_is_found_in_the_bundle(kernel: str, tmp_path: Path) -> None:
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


def test_wrong_weights_are_found_in_the_expert_rows_of_the_bundle(tmp_path: Path) -> None:
    leave_bundle(tmp_path, run_with_weights_of_another_expert, tiny_case(), RANK)
    analysis = analyse(open_bundle(tmp_path))
    wrong = {(found.stage, found.rank) for found in analysis.findings if found.wrong and found.arm == "padded"}
    assert ("experts", RANK) in wrong
    assert not any(stage == "dispatch" for stage, _ in wrong)


def test_missing_bundle_part_is_named_and_no_verdict_is_confirmed(tmp_path: Path) -> None:
    outcome = leave_bundle(tmp_path, run_with_fault, tiny_case(), "experts", "drop a contribution", "control", RANK)
    (tmp_path / part_name(1)).unlink()
    analysis = analyse(open_bundle(tmp_path))
    assert "rank-00001" in analysis.missing[0]
    assert not analysis.confirms(outcome.judgement.verdict, [found.cause for found in outcome.diagnosis])


def test_bundle_parts_hold_failing_tokens_and_the_routing_of_all_tokens(tmp_path: Path) -> None:
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


def test_failing_tokens_beyond_the_bundle_limit_are_counted(tmp_path: Path) -> None:
    case = tiny_case(tokens=64, limit="1", policy="unchecked")
    leave_bundle(tmp_path, run_healthy, case)
    recorded = open_bundle(tmp_path).manifest.recorded
    assert len(recorded.tokens) == MAX_TOKENS
    differing = max(one.differing_tokens for one in open_bundle(tmp_path).report.comparison)
    assert differing > 2 * MAX_TOKENS
    assert recorded.left_out == differing - MAX_TOKENS
    assert open_bundle(tmp_path).manifest.cuts == [
        f"{recorded.left_out} failing tokens or more, beside the 64 recorded"
    ]
    assert analyse(open_bundle(tmp_path)).confirms(
        Verdict.UNDER_LIMIT, [found.cause for found in open_bundle(tmp_path).report.diagnosis]
    )


def rewritten(folder: Path, outcome: Outcome) -> Bundle:
    """Rewrite the manifest of a bundle for another outcome; without its map the report is the smaller file."""
    bundle = open_bundle(folder)
    report = msgspec.structs.replace(bundle.report, differing=None)
    write_manifest(folder, report, outcome, bundle.manifest.recorded)
    return open_bundle(folder)


def test_manifest_lists_are_shortened_to_the_readable_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = leave_bundle(tmp_path, run_healthy, tiny_case(tokens=64, limit="1", policy="unchecked"))
    assert outcome.gathered is not None
    whole = msgspec.json.encode(open_bundle(tmp_path).manifest)
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", len(whole) * 4 // 5)
    bundle = rewritten(tmp_path, outcome)
    most = bundle.manifest.listed_tokens
    assert most < LISTED_TOKENS
    assert bundle.manifest.cuts[-1] == f"tokens that ranks list after the first {most}"
    assert (tmp_path / "manifest.json").stat().st_size <= len(whole) * 4 // 5
    assert analyse(bundle).confirms(Verdict.UNDER_LIMIT, [found.cause for found in bundle.report.diagnosis])
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", 1000)
    with pytest.raises(InvalidCase, match=r"manifest\.json: cannot be read"):
        rewritten(tmp_path, outcome)


def test_invalid_source_ids_of_a_transport_do_not_break_the_bundle(tmp_path: Path) -> None:
    outcome = leave_bundle(tmp_path, run_healthy, tiny_case(tokens=40, limit="max-recv-1", policy="unchecked"))
    assert outcome.gathered is not None
    record = next(one for one in outcome.gathered.observations if one.divergences)
    first = record.divergences[0]
    record.divergences[0] = msgspec.structs.replace(
        first, source_rank=1 << 20, evidence=Evidence(tokens=[(-1, 0), (0, 1)])
    )
    found = rewritten(tmp_path, outcome).manifest.gathered
    assert found is not None
    read_back = found.observations[record.rank].divergences[0]
    assert (read_back.source_rank, read_back.source_token, read_back.evidence.tokens) == (None, None, [(0, 1)])


def test_kernel_table_too_large_for_a_bundle_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Path("tests/data/splitk.csv")
    monkeypatch.setattr(manifest_module, "MAX_TABLE_BYTES", 10)
    case = tiny_case(limit="max-recv-1", policy="unchecked", kernel_table=str(table))
    leave_bundle(tmp_path, run_healthy, case)
    bundle = open_bundle(tmp_path)
    assert bundle.manifest.table_left_out == table.stat().st_size
    assert "--kernel-table FILE" in bundle.manifest.cuts[0]
    with pytest.raises(InvalidCase, match="give --kernel-table FILE"):
        runnable_case(bundle)
    assert runnable_case(bundle, [Layer("flag", {"kernel_table": str(table)})]).kernel_table == str(table)


def test_routing_of_lost_ranks_is_written_and_its_truncation_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_module, "RECORDED_BYTES", 4 * 10 * 4 * FP8.topk)
    case = msgspec.structs.replace(FP8, tokens=(40, 5, 0, 11))
    recorded = write_routing(tmp_path, case, {0: "one", 1: "other"})
    assert recorded.routing_left_out == 30 + 1
    assert [part.host for part in recorded.parts] == ["one", "other", "unknown", "unknown"]
    outcome = Outcome(case, Judgement(Verdict.HANG, [], None))
    environment = capture_environment({}, [], [])
    report = build_report(Entry(name="run", case=case, sources={}), outcome, environment=environment, wall_s=0.0)
    write_manifest(tmp_path, report, outcome, recorded)
    bundle = open_bundle(tmp_path)
    assert bundle.manifest.cuts == ["the routing of 31 tokens"]
    findings = analyse(bundle).findings
    assert [(found.rows, found.wrong) for found in findings] == [(10, 0), (5, 0), (0, 0), (10, 0)]
    assert tensors_of(bundle, 1)["routing"].tolist() == workload_for(case, CPU).tokens(1).ids.tolist()


def passed(session: Session, folder: Path, case: Case) -> bool:
    recorder = Recorder()
    run_case(session, case, recorder)
    return write_parts(session, recorder, folder, None) is None


def test_passing_case_writes_no_bundle(tmp_path: Path) -> None:
    assert on_ranks(4, passed, tmp_path / "bundle", tiny_case()) == [True] * 4
    assert not (tmp_path / "bundle").exists()


def test_bundle_records_the_repeat_that_the_report_describes(tmp_path: Path) -> None:
    case = tiny_case(repeats=3)
    outcome = leave_bundle(tmp_path, run_with_fault, case, "experts", "double a contribution", "truncated", RANK)
    causes = [found.cause for found in outcome.diagnosis]
    assert analyse(open_bundle(tmp_path)).confirms(Verdict.CORRUPT, causes)


def test_bundle_of_a_refused_case_has_no_parts(tmp_path: Path) -> None:
    case = tiny_case(tokens=65)
    outcome = leave_bundle(tmp_path, run_healthy, case)
    bundle = open_bundle(tmp_path)
    assert outcome.judgement.verdict is Verdict.OVERFLOW
    assert bundle.manifest.recorded.parts == []
    assert analyse(bundle).judgement is None
