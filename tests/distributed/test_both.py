"""A case with both kinds of inputs: exact ones decide bits, gaussian ones errors, in one verdict and one report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distbench.case.entry import Entry
from distbench.case.expectations import BY_LIMIT
from distbench.case.kinds import repeats_of
from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.experts import make_experts
from distbench.experts.base import ExpertInput, Experts, ExpertWeights
from distbench.experts.selection.choice import KernelChoice
from distbench.pipeline.run_case import run_case
from distbench.report.bundle.analysis import analyse
from distbench.report.bundle.read import open_bundle
from distbench.report.console import verdict_line
from distbench.report.document import build_report
from distbench.report.environment import NO_ENVIRONMENT
from distbench.report.schema import Report
from distbench.verify.combine_check import CombineChecker
from distbench.verify.error_check import ErrorChecker
from distbench.verify.records import Gathered, Outcome
from tests.cases import tiny_case
from tests.distributed.bundles import leave_bundle
from tests.ranks import on_ranks

RANKS = 2
ARMS = ["padded", "control", "repadded", "truncated"]
Damage = Callable[[Tensor], object]


class Damaged(Experts):
    """Experts that damage their result in some calls: 0 to 3 are the arms with exact, 4 to 7 with gaussian inputs."""

    def __init__(self, inner: Experts, damage: Damage, calls: range, numbers: Iterator[int]) -> None:
        self._inner, self._damage, self._calls, self._numbers = inner, damage, calls, numbers

    def selection(self, rows: int) -> KernelChoice:
        return self._inner.selection(rows)

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        rows = self._inner(given, weights)
        if next(self._numbers) in self._calls:
            self._damage(rows[: int(given.num_local_tokens)])
        return rows


def nan_lane(rows: Tensor) -> None:
    rows[:, -1] = float("nan")


def truncated_roundings(rows: Tensor) -> None:
    """Clear the last bit of every value: it is zero in most values of exact inputs, not in realistic ones."""
    rows.view(torch.int16).bitwise_and_(-2)


def both_case(ep_size: int = RANKS, **values: Any) -> Case:
    return tiny_case(ep_size, **{"numerics": "both"} | values)


def run_damaged(session: Session, case: Case, damage: Damage, calls: range, rank: int = 1) -> Outcome | None:
    numbers = count()

    def experts(case: Case) -> Experts:
        return Damaged(make_experts(case), damage, calls, numbers)

    if session.rank != rank:
        return run_case(session, case)
    with patch("distbench.pipeline.run_case.make_experts", experts):
        return run_case(session, case)


def run_and_count(session: Session, case: Case) -> tuple[Outcome | None, int]:
    """The outcome, and the repeats that the rank's heartbeat counts."""
    return run_case(session, case), session.heartbeat.repeat


def run_and_count_exchanges(session: Session, case: Case, apart: str) -> tuple[Outcome | None, int]:
    """The outcome, and the exchanges of a case whose sampled rows travel alone as `apart` says."""
    with contextlib.ExitStack() as stack:
        if apart == "too many":
            stack.enter_context(patch.object(CombineChecker, "_fits", return_value=False))
        if apart == "a rank has others" and session.rank == 1:
            stack.enter_context(patch.object(ErrorChecker, "rider", return_value=None))
        memory = session.shared
        assert memory is not None
        before = memory._calls
        outcome = run_case(session, case)
        return outcome, memory._calls - before


def outcome_of(case: Case) -> Outcome:
    found: Outcome = on_ranks(case.ep_size, run_case, case)[0]
    return found


def report_of(outcome: Outcome, expect: str = BY_LIMIT) -> Report:
    named = Entry(name="both", case=outcome.case, sources={}, expect=expect)
    return build_report(named, outcome, environment=NO_ENVIRONMENT, wall_s=0.0)


def gaussian_part(outcome: Outcome) -> Gathered:
    assert outcome.gathered is not None
    assert outcome.gathered.gaussian is not None
    return outcome.gathered.gaussian


def test_numerics_both_is_the_default() -> None:
    assert resolve_case([Layer("test", {"model": "tiny"})], RANKS).case.numerics == "both"


def test_report_of_numerics_both_has_bitwise_comparisons_and_errors() -> None:
    outcome = outcome_of(both_case(RANKS, tokens=(37, 21)))
    report = report_of(outcome)
    assert (report.verdict.value, report.findings) == ("PASS", [])
    assert all(comparison.equal for comparison in report.comparison)
    assert [error.arm for error in report.errors if error.stage == "combine"] == ARMS
    assert all(error.within and error.ratio is not None for error in report.errors)
    assert "bit for bit, 58 tokens on 2 ranks; errors " in verdict_line(report)
    assert " of ideal" in verdict_line(report)


@pytest.mark.parametrize("limit", ["sum32", "max-recv-1"])
def test_errors_are_the_same_whether_sampled_rows_travel_with_those_of_combine_or_alone(limit: str) -> None:
    case = both_case(RANKS, tokens=(37, 21), routing="local", limit=limit, policy="unchecked")
    made = {
        apart: on_ranks(RANKS, run_and_count_exchanges, case, apart) for apart in ("", "too many", "a rank has others")
    }
    errors = {apart: report_of(ranks[0][0]).errors for apart, ranks in made.items()}
    assert errors[""]
    assert errors[""] == errors["too many"] == errors["a rank has others"]
    exchanges = {apart: [number for _, number in ranks] for apart, ranks in made.items()}
    assert exchanges["too many"] == exchanges["a rank has others"] == [number + 2 for number in exchanges[""]]


@pytest.mark.parametrize("gather", ["rows", "digests"])
def test_nondeterminism_of_an_atomic_kernel_in_gaussian_inputs_is_a_note(gather: str) -> None:
    outcome = outcome_of(both_case(RANKS, tokens=(37, 21), routing="local", gather=gather))
    assert gaussian_part(outcome).comparisons["padded/control"].differing_tokens
    assert outcome.judgement.verdict.value == "PASS"
    notes = [note for note in outcome.judgement.reasons if note.code in ("control-differs", "kernel-drift")]
    assert notes
    assert all(note.message.startswith("gaussian inputs: ") for note in notes)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("inputs", ["exact", "gaussian"])
def test_nan_is_found_with_either_kind_of_inputs(arm: str, inputs: str) -> None:
    call = ARMS.index(arm) + 4 * (inputs == "gaussian")
    outcome: Outcome = on_ranks(RANKS, run_damaged, both_case(RANKS), nan_lane, range(call, call + 1))[0]
    verdict = "BASELINE_WRONG" if arm == "padded" else "CORRUPT"
    first = outcome.judgement.findings[0]
    assert (outcome.judgement.verdict.value, first.inputs) == (verdict, inputs)
    assert "nan" in {reason.code for reason in first.reasons}
    assert outcome.judgement.reasons[0].message.startswith("gaussian inputs: ") is (inputs == "gaussian")
    assert outcome.judgement.first_divergence is None or outcome.judgement.first_divergence.arm == arm


@pytest.mark.parametrize(("calls", "verdict"), [(range(4, 8), "BASELINE_WRONG"), (range(7, 8), "CORRUPT")])
def test_error_outside_its_bounds_fails_a_case_whose_exact_bits_are_right(calls: range, verdict: str) -> None:
    case = both_case(RANKS, tokens=64)
    outcome: Outcome = on_ranks(RANKS, run_damaged, case, truncated_roundings, calls)[0]
    report = report_of(outcome)
    assert all(comparison.equal for comparison in report.comparison)
    assert report.verdict.value == verdict
    assert "error" in report.findings[0].codes
    assert any(not error.within and error.outside == [1] for error in report.errors if error.stage == "experts")


def test_injected_fault_fires_with_both_kinds_of_inputs() -> None:
    both = outcome_of(both_case(RANKS, inject="nan-lanes:arm=truncated"))
    exact = outcome_of(both_case(RANKS, inject="nan-lanes:arm=truncated", numerics="exact"))
    hits = [sum(report_of(one).injected[0].hits.values()) for one in (both, exact)]
    assert hits[0] == 2 * hits[1] > 0
    found = [(one.verdict.value, one.inputs) for one in both.judgement.findings]
    assert found[:2] == [("CORRUPT", "exact"), ("CORRUPT", "gaussian")]


def test_repeats_and_timing_run_with_exact_inputs_only() -> None:
    case = both_case(RANKS, repeats=3, until_failure=True, iterations=2, warmup=0, routing="local")
    (outcome, ended), *others = on_ranks(RANKS, run_and_count, case)
    assert {ended, *(ended for _, ended in others)} == {repeats_of(case)} == {3 + 1}
    report = report_of(outcome)
    assert report.verdict.value == "PASS"
    assert report.rate is not None
    assert (report.rate.repeats, report.rate.wrong_tokens) == (3, 0)
    assert report.timing["padded"]["layer"]["iterations"] == 2
    assert [record.token_counts.repeats for record in gaussian_part(outcome).observations] == [1] * RANKS
    assert not any(record.timed for record in gaussian_part(outcome).observations)


@pytest.mark.parametrize("policy", ["strict", "unchecked", "guard"])
def test_lost_rows_are_reported_once_for_both_kinds_of_inputs(policy: str) -> None:
    outcome = outcome_of(both_case(RANKS, limit="max-recv-1", policy=policy))
    verdicts = [found.verdict.value for found in outcome.judgement.findings]
    assert verdicts == ([] if policy == "guard" else ["UNDER_LIMIT"])


@pytest.mark.parametrize(
    "parts",
    [
        {"transport": "mori", "emulate": True, "combine_quant": "fp8_blockwise"},
        {"experts": "aiter", "emulate": True, "dispatch_dtype": "fp8"},
        {"dispatch_dtype": "fp8"},
        {"ep_size": 1},
    ],
)
def test_every_transport_and_experts_passes_with_both_kinds_of_inputs(parts: dict[str, Any]) -> None:
    ranks = parts.get("ep_size", RANKS)
    outcome = outcome_of(both_case(ranks, **{key: value for key, value in parts.items() if key != "ep_size"}))
    assert outcome.judgement.verdict.value == "PASS"
    assert gaussian_part(outcome).observations[0].errors


@pytest.mark.parametrize(("calls", "inputs"), [(range(3, 4), "exact"), (range(7, 8), "gaussian")])
def test_bundle_records_the_kind_of_inputs_with_which_the_case_failed(
    tmp_path: Path, calls: range, inputs: str
) -> None:
    outcome = leave_bundle(tmp_path, run_damaged, both_case(RANKS), nan_lane, calls)
    bundle = open_bundle(tmp_path)
    assert bundle.manifest.recorded.inputs == inputs
    assert bundle.manifest.recorded.tokens
    analysis = analyse(bundle)
    assert analysis.trusted
    assert analysis.confirms(outcome.judgement.verdict, [found.cause for found in outcome.diagnosis])
    assert [found.stage for found in outcome.diagnosis if found.stage] == ["experts"]


@pytest.mark.parametrize(
    ("expect", "expected"),
    [("CORRUPT", True), ("CORRUPT:experts-differs,nan,error,bits-differ", True), ("CORRUPT:experts-differs", False)],
)
def test_expectation_matches_reasons_from_both_kinds_of_inputs(expect: str, expected: bool) -> None:
    outcome: Outcome = on_ranks(RANKS, run_damaged, both_case(RANKS), nan_lane, range(3, 4))[0]
    assert report_of(outcome, expect=expect).as_expected is expected


@pytest.mark.parametrize("arm", ARMS[1:])
def test_distance_of_an_arm_excludes_damage_in_other_arms(arm: str) -> None:
    calls = range(ARMS.index(arm), ARMS.index(arm) + 1)
    case = both_case(numerics="gaussian")
    outcome: Outcome = on_ranks(RANKS, run_damaged, case, nan_lane, calls)[0]
    assert outcome.gathered is not None
    for record in outcome.gathered.observations:
        assert [one for one, far in record.distance.items() if far is None] == [arm]


def test_pass_line_counts_blind_spots_of_a_shape_without_probes() -> None:
    report = report_of(outcome_of(both_case(RANKS, hidden_size=16, intermediate_size=16, topk=1, tokens=(5, 3))))
    assert report.verdict.value == "PASS"
    assert report.blind_spots
    assert f"{len(report.blind_spots)} blind spots of exact inputs" in verdict_line(report)
