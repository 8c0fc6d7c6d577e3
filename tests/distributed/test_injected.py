"""Every fault that a case can ask for: the verdict, the first stage and the rank, and what the report says of it."""

from __future__ import annotations

import pytest

from distbench.case import Case
from distbench.errors import InvalidCase
from distbench.faults.injector import FAULTS, check_faults
from distbench.rank import run_case
from distbench.report.console import verdict_line
from distbench.report.document import Report, build_report
from distbench.report.environment import capture_environment
from distbench.selftest.outcomes import result_of
from distbench.selftest.trials import DEAD, Trial, trials
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

RANKS = 4
TRIALS = {trial.label: trial for trial in trials(RANKS, 1, 0) if trial.verdict not in DEAD}


def report_of(trial: Trial) -> Report:
    outcome: Outcome = on_ranks(RANKS, run_case, trial.entry.case)[0]
    return build_report(trial.entry, outcome, environment=capture_environment({}, [], []), wall_s=0.0)


def test_each_fault_is_tried() -> None:
    assert {trial.label.split(":")[0] for trial in trials(RANKS, 1, 0)} >= FAULTS.keys()


@pytest.mark.parametrize("label", TRIALS)
def test_a_fault_is_caught_placed_and_announced(label: str) -> None:
    trial = TRIALS[label]
    report = report_of(trial)
    result = result_of(trial, report)
    assert result.fired
    assert result.caught
    assert result.right, (result, report.diagnosis)
    assert not result.healthy_blamed
    assert "INJECTED FAULT" in verdict_line(report)


@pytest.mark.parametrize("number", range(8))
def test_random_clean_cases_pass(number: int) -> None:
    trial = trials(RANKS, 0, 8)[number]
    report = report_of(trial)
    assert report.verdict.value == "PASS"
    assert report.injected == []
    assert report.rate is None or report.rate.wrong_tokens == 0


def rate_case(**values: object) -> Case:
    keys = {"tokens": 64, "limit": "max-recv", "inject": "corrupt-tokens:rank=all,rate=0.002"} | values
    return tiny_case(RANKS, **keys)


def test_the_rate_covers_the_true_one() -> None:
    case = rate_case(repeats=12)
    trial = Trial(label="rate", entry=TRIALS["delay"].entry, verdict="")
    outcome: Outcome = on_ranks(RANKS, run_case, case)[0]
    report = build_report(trial.entry, outcome, environment=capture_environment({}, [], []), wall_s=0.0)
    assert report.rate is not None
    assert report.rate.repeats == 12
    assert report.rate.tokens == 64 * RANKS * (1 + 12 * 3)
    assert report.rate.low_per_million <= 2000 <= report.rate.high_per_million


def test_until_failure_ends_with_the_first_failing_repeat() -> None:
    outcome: Outcome = on_ranks(RANKS, run_case, rate_case(repeats=500, until_failure=True))[0]
    assert outcome.gathered is not None
    repeats = {record.exposure.repeats for record in outcome.gathered.observations}
    assert len(repeats) == 1
    assert repeats.pop() < 500
    assert sum(record.exposure.wrong for record in outcome.gathered.observations) > 0


def test_a_zero_that_lost_its_sign_is_not_blamed_on_a_sender() -> None:
    case = tiny_case(RANKS, seed=3, inject="negative-zero:rank=2")
    outcome: Outcome = on_ranks(RANKS, run_case, case)[0]
    assert outcome.judgement.verdict.value == "BASELINE_WRONG"
    assert (outcome.diagnosis[0].stage, outcome.diagnosis[0].ranks) == ("combine", [2])


def test_ids_that_aiter_must_not_see_end_the_rank_that_has_them_and_no_other() -> None:
    case = tiny_case(2, experts="aiter", emulate=True, inject="ids-out-of-range:rank=1")
    with pytest.raises(AssertionError, match=r"rank 1: (.|\n)*DistbenchError: .*topk_ids holds -1 in a valid row"):
        on_ranks(2, run_case, case)


def test_jitter_changes_no_bit() -> None:
    outcome: Outcome = on_ranks(RANKS, run_case, tiny_case(RANKS, jitter=3.0, repeats=2))[0]
    assert outcome.judgement.verdict.value == "PASS"


@pytest.mark.parametrize(
    "inject", ["no-such-fault", "hang:colour=red", "flipped-bit:rank=9", "flipped-bit:arm=left", "delay:ms=soon"]
)
def test_a_fault_that_does_not_exist_is_refused(inject: str) -> None:
    with pytest.raises(InvalidCase, match="allowed"):
        check_faults(tiny_case(RANKS, inject=inject))
