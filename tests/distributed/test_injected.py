"""Every fault that a case can inject: the verdict, the first stage, the rank, and the report."""

from __future__ import annotations

import msgspec
import pytest

from distbench.case.entry import Entry
from distbench.case.spec import Case
from distbench.errors import InvalidCase
from distbench.faults.injector import FAULTS, check_faults
from distbench.pipeline.run_case import run_case
from distbench.report.console import verdict_line
from distbench.report.document import build_report
from distbench.report.environment import capture_environment
from distbench.report.schema import Report
from distbench.tools.selftest.cases import DEAD, FaultTrial, plan, trials
from distbench.tools.selftest.outcomes import result_of
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

RANKS = 4
TRIALS = {trial.label: trial for trial in trials(RANKS, 1, 0) if trial.verdict not in DEAD}


def report_of(trial: FaultTrial) -> Report:
    return report_of_entry(trial.entry)


def report_of_case(case: Case) -> Report:
    return report_of_entry(Entry(name="case", case=case, sources={}))


def report_of_entry(entry: Entry) -> Report:
    outcome: Outcome = on_ranks(RANKS, run_case, entry.case)[0]
    return build_report(entry, outcome, environment=capture_environment({}, [], []), wall_s=0.0)


def test_selftest_trials_contain_every_fault() -> None:
    of_any = {name for name, kind in FAULTS.items() if not kind.transport}
    assert {trial.label.split(":")[0] for trial in trials(RANKS, 1, 0)} >= of_any


@pytest.mark.parametrize("label", TRIALS)
def test_injected_fault_is_caught_with_its_stage_and_rank_and_reported(label: str) -> None:
    trial = TRIALS[label]
    report = report_of(trial)
    result = result_of(trial, report)
    assert result.fired
    assert result.caught
    assert result.right, (result, report.diagnosis)
    assert not result.healthy_blamed
    assert "INJECTED FAULT" in verdict_line(report)


def test_fault_of_a_plugin_is_judged_by_the_stage_that_its_class_states() -> None:
    name = "tests.brought_plugins:Doubled"
    (trial,) = [one for one in plan(RANKS, 1, 0, brought=[name]).trials if one.label == name]
    report = report_of(trial)
    assert report.injected[0].stage == "combine"
    assert result_of(trial, report).right
    elsewhere = [msgspec.structs.replace(report.injected[0], stage="dispatch")]
    assert not result_of(trial, msgspec.structs.replace(report, injected=elsewhere)).right


@pytest.mark.parametrize("number", range(8))
def test_random_case_without_a_fault_passes(number: int) -> None:
    trial = trials(RANKS, 0, 8)[number]
    report = report_of(trial)
    assert report.verdict.value == "PASS"
    assert report.injected == []
    assert report.rate is None or report.rate.wrong_tokens == 0


def rate_case(**values: object) -> Case:
    keys = {"tokens": 64, "limit": "max-recv", "inject": "corrupt-tokens:rank=all,rate=0.002"} | values
    return tiny_case(RANKS, **keys)


def test_rate_interval_covers_the_true_rate_of_an_injected_fault() -> None:
    case = rate_case(repeats=12)
    trial = FaultTrial(label="rate", entry=TRIALS["delay"].entry, verdict="")
    outcome: Outcome = on_ranks(RANKS, run_case, case)[0]
    report = build_report(trial.entry, outcome, environment=capture_environment({}, [], []), wall_s=0.0)
    assert report.rate is not None
    assert report.rate.repeats == 12
    assert report.rate.tokens == 64 * RANKS * (1 + 12 * 3)
    assert report.rate.low_per_million <= 2000 <= report.rate.high_per_million


def test_until_failure_stops_at_the_first_failing_repeat() -> None:
    outcome: Outcome = on_ranks(RANKS, run_case, rate_case(repeats=500, until_failure=True))[0]
    assert outcome.gathered is not None
    repeats = {record.token_counts.repeats for record in outcome.gathered.observations}
    assert len(repeats) == 1
    assert repeats.pop() < 500
    assert sum(record.token_counts.wrong for record in outcome.gathered.observations) > 0


def test_zero_with_a_wrong_sign_is_not_blamed_on_a_sender() -> None:
    case = tiny_case(RANKS, seed=3, inject="negative-zero:rank=2")
    outcome: Outcome = on_ranks(RANKS, run_case, case)[0]
    assert outcome.judgement.verdict.value == "BASELINE_WRONG"
    assert (outcome.diagnosis[0].stage, outcome.diagnosis[0].ranks) == ("combine", [2])


def test_out_of_range_ids_end_only_the_rank_that_holds_them() -> None:
    case = tiny_case(2, experts="aiter", emulate=True, inject="ids-out-of-range:rank=1")
    with pytest.raises(AssertionError, match=r"rank 1: (.|\n)*DistbenchError: .*topk_ids holds -1 in a valid row"):
        on_ranks(2, run_case, case)


def test_jitter_does_not_change_any_bit() -> None:
    outcome: Outcome = on_ranks(RANKS, run_case, tiny_case(RANKS, jitter=3.0, repeats=2))[0]
    assert outcome.judgement.verdict.value == "PASS"


@pytest.mark.parametrize(
    ("inject", "told"),
    [
        ("no-such-fault", "no such fault; allowed are short-limit, "),
        ("hang:colour=red", "no option 'colour'; allowed are rank, arm, sub_batch, stage"),
        ("flipped-bit:rank=9", "rank = '9'; allowed are 0 to 3, or all"),
        ("flipped-bit:arm=left", "arm = 'left'; allowed are padded, control, repadded, truncated"),
        ("flipped-bit:field=payload", "field = 'payload'; allowed are hidden, scales, weights, ids"),
        ("flipped-bit:field=_fields", "field = '_fields'; allowed are hidden, "),
        ("flipped-bit:bit=-2", "bit = '-2'; allowed are whole numbers from -1 to 1048575"),
        ("hang:stage=foo", "stage = 'foo'; allowed are dispatch, experts, combine"),
        ("corrupt-tokens:rate=nan", "rate = 'nan'; allowed are numbers from 1e-09 to 1"),
        ("corrupt-tokens:rate=2", "rate = '2'; allowed are numbers from 1e-09 to 1"),
        ("cross-node:node=0", "node = '0'; allowed are whole numbers from 1 to 1024"),
        ("delay:ms=-5", "ms = '-5'; allowed are numbers from 0 to 60000"),
        ("delay:ms=soon", "ms = 'soon'; allowed are numbers from 0 to 60000"),
        ("delay:ms=inf", "ms = 'inf'; allowed are numbers from 0 to 60000"),
        ("slots-lost:first=1.5", "first = '1.5'; allowed are whole numbers from 0 to 1024"),
    ],
)
def test_unknown_fault_or_option_is_refused_with_the_allowed_ones(inject: str, told: str) -> None:
    with pytest.raises(InvalidCase) as refusal:
        check_faults(tiny_case(RANKS, inject=inject))
    assert told in str(refusal.value)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_option_with_a_value_outside_its_list_is_refused(name: str) -> None:
    for key in FAULTS[name].all_options(RANKS):
        for value in ("zzz", "nan", "-7", "1e30", "__class__"):
            with pytest.raises(InvalidCase, match="allowed are"):
                check_faults(tiny_case(RANKS, inject=f"{name}:{key}={value}"))


@pytest.mark.parametrize(
    ("inject", "needs"),
    [
        ("flipped-bit:field=scales", "field=scales needs dispatch_dtype fp8"),
        ("slots-lost", "a topk above `first`"),
        ("cross-node:node=4", "more ranks than `node`"),
        ("flipped-token-bit:arm=truncated", "a limit, for arm truncated"),
        ("short-limit", "a limit, and rows"),
    ],
)
def test_fault_that_changes_nothing_reports_its_precondition(inject: str, needs: str) -> None:
    report = report_of_case(tiny_case(RANKS, inject=inject, limit="off"))
    assert report.verdict.value == "PASS"
    assert report.injected[0].hits == {}
    assert needs in report.injected[0].needs


def test_one_fault_on_two_ranks_is_counted_on_both() -> None:
    report = report_of_case(tiny_case(RANKS, inject="swapped-rows:rank=1;swapped-rows:rank=2"))
    assert [list(one.hits) for one in report.injected] == [["1"], ["2"]]
    assert {one.needs for one in report.injected} == {""}
