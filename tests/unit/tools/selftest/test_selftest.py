"""Trials of a self-test with other parts and keys, and its judgement of reports."""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace

from distbench.case.resolve import FLAGS, Layer
from distbench.errors import Verdict
from distbench.faults.injector import FAULTS
from distbench.report.schema import InjectedReport, Report
from distbench.tools.selftest.cases import DEAD, EXACT_ONLY, FaultTrial, plan
from distbench.tools.selftest.outcomes import Outcomes, is_clean, result_of
from distbench.tools.selftest.table import closing_lines
from distbench.verify.records import Diagnosis, Reason
from tests.reports import report_of

MORI_AITER = [Layer(FLAGS, {"transport": "mori", "experts": "aiter", "emulate": "true"}, strict=False)]


def trial_of(label: str, *asked: Layer) -> FaultTrial:
    return next(one for one in plan(4, 1, 0, asked).trials if one.label == label)


def test_requested_keys_hold_in_every_selftest_case_unless_a_fault_needs_others() -> None:
    asked = Layer(FLAGS, {"slot_order": "source", "limit": "off", "tokens": "9"}, strict=False)
    found = plan(4, 2, 20, [asked])
    assert {one.entry.case.slot_order for one in found.trials} == {"source"}
    assert {one.entry.case.limit for one in found.trials if not one.label} == {"off"}
    assert trial_of("off-by-one", asked).entry.case.limit == "sum32"
    assert trial_of("swapped-tokens", asked).entry.case.tokens == (9,) * 4
    assert trial_of("capacity-ignored", asked).entry.case.tokens == (12,) * 4


def test_clean_selftest_cases_include_gaussian_inputs() -> None:
    numerics = [one.entry.case.numerics for one in plan(4, 1, 50).trials if not one.label]
    assert numerics.count("gaussian") == 10


def test_every_fault_of_an_arm_is_tried_in_gaussian_inputs_alone_in_some_seeds() -> None:
    def gaussian(seeds: int) -> dict[str, int]:
        names = [one.label.split(":")[0] for one in plan(4, seeds, 0).trials if one.entry.case.numerics == "gaussian"]
        return Counter(names)

    of_an_arm = {name for name, kind in FAULTS.items() if not kind.verdict and not kind.transport} - {*EXACT_ONLY}
    assert gaussian(5).keys() == of_an_arm
    quick = gaussian(1)
    assert quick.keys() >= {name for name in of_an_arm if FAULTS[name].stage == "experts"}
    assert len(quick) < len(of_an_arm)


def test_guard_of_an_adapter_holds_in_gaussian_inputs_too() -> None:
    labels = [one.label for one in plan(4, 5, 0, MORI_AITER).trials if one.guard]
    assert "dispatched-ids:numerics=gaussian" in labels


def test_faults_that_selftest_cannot_try_are_named_with_the_reason() -> None:
    found = plan(2, 1, 0)
    of_symmetric = {name for name, kind in FAULTS.items() if kind.transport}
    too_few = {"cross-node", "slots-lost", "dispatched-ids", "ids-of-the-other-sub-batch"}
    assert set(found.impossible) == too_few | of_symmetric
    tried = {one.label.split(":")[0] for one in found.trials if "+" not in one.label}
    assert tried | set(found.impossible) == FAULTS.keys()
    two_nodes = Layer(FLAGS, {"transport": "mori", "emulate": "true", "gpu_per_node": "2"}, strict=False)
    assert "capacity-ignored" in plan(4, 1, 0, [two_nodes]).impossible


def test_selftest_tries_both_row_counts_at_which_a_kernel_dies() -> None:
    limits = [one.entry.case.limit for one in plan(2, 1, 0).trials if one.label.startswith("dies-at")]
    assert limits == ["304", "336"]


def test_selftest_tries_a_fault_that_costs_a_launch_with_few_seeds() -> None:
    found = plan(4, 5, 0, MORI_AITER).trials
    assert len([one for one in found if one.label == "dispatched-ids"]) == 3
    assert len([one for one in found if one.label == "swapped-rows"]) == 5
    assert [one.deadly for one in found] == sorted(one.deadly for one in found)


def lost(trial: FaultTrial, stage: str, rank: int) -> Report:
    reason = Reason(code="rank-fault", rank=rank, stage=stage, message="made up")
    return replace(report_of(trial.entry.case, "", Verdict.PASS), verdict=Verdict.RANK_FAULT, reasons=[reason])


def test_guard_counts_as_right_only_in_its_stage_and_on_its_rank() -> None:
    strict, loose = (trial_of(label, *MORI_AITER) for label in ("dispatched-ids", "flipped-bit:field=ids"))
    assert (strict.verdict, strict.stage, loose.verdict in DEAD) == ("RANK_FAULT", "combine", False)
    (rank,) = strict.ranks
    assert result_of(strict, lost(strict, "combine", rank)).right
    assert not result_of(strict, lost(strict, "experts", rank)).right
    assert result_of(strict, lost(strict, "combine", (rank + 1) % 4)).healthy_blamed
    (rank,) = loose.ranks
    assert result_of(loose, lost(loose, "experts", rank)).right
    shifted = trial_of("shifted-window", *MORI_AITER)
    assert result_of(shifted, lost(shifted, "experts", shifted.ranks[0])).right
    unguarded = trial_of("flipped-bit:field=ids")
    assert not result_of(unguarded, lost(unguarded, "experts", unguarded.ranks[0])).right


def test_stage_explained_by_another_fault_does_not_count_as_right() -> None:
    trial = trial_of("zero-rows")
    (rank,) = trial.ranks
    diagnosis = [Diagnosis(cause="experts: zeros", confidence="certain", evidence="", stage="experts", ranks=[rank])]
    injected = [InjectedReport(name="zero-rows", options={}, hits={str(rank): 3})]
    report = replace(report_of(trial.entry.case, "x", Verdict(trial.verdict)), diagnosis=diagnosis, injected=injected)
    assert result_of(trial, report).right
    other = replace(report, diagnosis=[replace(diagnosis[0], stage="combine")])
    assert not result_of(trial, other).right
    assert result_of(trial, replace(report, injected=[])).fired is False


def test_only_nondeterminism_of_an_atomic_kernel_is_no_false_alarm() -> None:
    clean = plan(2, 1, 1).trials[0]
    report = replace(report_of(clean.entry.case, "other bits", Verdict.NONDETERMINISTIC), diagnosis=[])
    assert not is_clean(report)
    assert not is_clean(replace(report, verdict=Verdict.DRIFT))
    assert is_clean(replace(report, verdict=Verdict.PASS))


def outcomes(**values: object) -> Outcomes:
    known = {"rows": [], "clean": 3, "false_alarms": [], "missing": 0, "not_tried": {}, "ranks": 4}
    return Outcomes(**(known | {"parts": ["collective", "reference"], "stand_ins": []} | values))  # type: ignore[arg-type]


def test_selftest_that_tried_no_fault_fails() -> None:
    lines = closing_lines(outcomes(not_tried={"scales-not-cut": "needs fp8"}))
    assert lines[0] == "not tried here: scales-not-cut: needs fp8"
    assert lines[-1] == "selftest: FAILED"
