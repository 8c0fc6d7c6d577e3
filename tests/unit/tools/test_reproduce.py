"""bisect and shrink over a fake laboratory: a rule of the test decides which cases fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from distbench.case.identity import case_hash
from distbench.case.spec import Case
from distbench.errors import InvalidCase, Verdict
from distbench.report.limit import LimitReport
from distbench.report.schema import Report
from distbench.tools.bisect import Blame, bisect
from distbench.tools.lab import Lab, signature
from distbench.tools.shrink import Step, shrink
from distbench.verify.records import SEVERAL, Diagnosis
from tests.cases import tiny_case
from tests.reports import report_of

Rule = Callable[[Case], str]
"""Returns the cause of a failure, or nothing."""


class PretendedLab:
    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._known: dict[str, Report] = {}
        self.launches = 0

    @property
    def cases(self) -> int:
        return len(self._known)

    def run(self, cases: Iterable[Case]) -> list[Report]:
        wanted = list(cases)
        self.launches += any(case_hash(case) not in self._known for case in wanted)
        for case in wanted:
            self._known[case_hash(case)] = report_of(case, self._rule(case))
        return [self._known[case_hash(case)] for case in wanted]

    def first(self, cases: Iterable[Case], wanted: Callable[[Report], bool]) -> Case | None:
        return next((case for case in cases if wanted(self.run([case])[0])), None)


def lab(rule: Callable[[Case], Any]) -> Lab:
    def cause(case: Case) -> str:
        found = rule(case)
        return found if isinstance(found, str) else "broken" if found else ""

    return cast(Lab, PretendedLab(cause))


BASE = tiny_case(transport="mori", emulate=True, experts="aiter", dispatch_dtype="fp8", limit="48", policy="unchecked")
PARTS: dict[str, Callable[[Case], bool]] = {
    "transport": lambda case: case.transport == "mori",
    "experts": lambda case: case.experts == "aiter",
    "truncate": lambda case: case.limit != "off",
    "row order": lambda case: case.slot_order == "shuffled",
    "dispatch dtype": lambda case: case.dispatch_dtype == "fp8",
}


@pytest.mark.parametrize("part", PARTS)
def test_bisect_names_a_single_guilty_part(part: str, tmp_path: Path) -> None:
    found = bisect(lab(PARTS[part]), BASE, tmp_path)
    assert found.blame.guilty == (part,)
    assert not found.blame.needs
    assert found.launches == 4  # batches: the case, its other seeds, the swaps, the candidate cures


def test_bisect_names_a_kernel_that_only_the_limit_selects(tmp_path: Path) -> None:
    case = tiny_case(limit="48", kernel_table="tests/data/splitk.csv")
    found = bisect(lab(lambda case: case.limit != "off" and "splitk" in case.kernel_table), case, tmp_path)
    assert found.blame.guilty == ("kernel",)
    assert found.blame.needs == ("truncate",)


def test_bisect_names_the_condition_under_which_a_guilty_part_fails(tmp_path: Path) -> None:
    found = bisect(lab(lambda case: PARTS["experts"](case) and PARTS["truncate"](case)), BASE, tmp_path)
    assert found.blame.guilty == ("experts",)
    assert found.blame.needs == ("truncate",)
    assert "shows only with this truncate" in found.verdict


@pytest.mark.parametrize("pair", [("transport", "experts"), ("experts", "truncate"), ("truncate", "dispatch dtype")])
def test_bisect_names_two_independent_faults(pair: tuple[str, str], tmp_path: Path) -> None:
    found = bisect(lab(lambda case: any(PARTS[part](case) for part in pair)), BASE, tmp_path)
    assert found.blame == Blame(pair, independent=True)
    assert f"{pair[0]} and {pair[1]} are guilty, each by itself" in found.verdict


def test_parts_each_of_whose_swaps_cures_the_failure_are_reported_as_interacting(tmp_path: Path) -> None:
    needed = ("transport", "experts", "truncate")
    found = bisect(lab(lambda case: all(PARTS[part](case) for part in needed)), BASE, tmp_path)
    assert found.blame == Blame(("transport", "experts"), ("truncate",))
    assert (
        "transport and experts interact: each swap alone cures it, and shows only with this truncate" in found.verdict
    )


def test_swap_that_also_removes_the_guilty_stage_is_not_blamed(tmp_path: Path) -> None:
    case = tiny_case(transport="mori", emulate=True, inject="flipped-bit:rank=1")
    found = bisect(lab(lambda case: "flipped-bit" in case.inject), case, tmp_path)
    assert [result.parts for result in found.results if result.cured] == [("dispatch",), ("transport",)]
    assert found.blame == Blame(("dispatch",))


def test_no_part_is_blamed_if_no_swap_and_no_pair_cures_the_failure(tmp_path: Path) -> None:
    found = bisect(lab(lambda _: True), BASE, tmp_path)
    assert found.blame.guilty == ()
    assert "no swap and no pair" in found.verdict


def test_bisect_of_a_passing_case_blames_no_part(tmp_path: Path) -> None:
    found = bisect(lab(lambda _: False), BASE, tmp_path)
    assert found.blame.guilty == ()
    assert found.verdict == "the case does not fail here: fails on 0 of 64, 0 to 5.6 %"


def test_bisect_names_the_difference_between_report_and_local_result(tmp_path: Path) -> None:
    known = report_of(BASE, "broken")
    found = bisect(lab(lambda _: False), BASE, tmp_path, known)
    assert found.verdict.endswith("0 to 5.6 %; its report says CORRUPT, broken, here it ends in PASS")
    found = bisect(lab(lambda case: PARTS["experts"](case) and "otherwise"), BASE, tmp_path, known)
    assert found.blame.guilty == ("experts",)
    assert found.verdict.endswith("; its report says CORRUPT, broken, here it ends in CORRUPT, otherwise")
    assert "its report" not in bisect(lab(PARTS["experts"]), BASE, tmp_path, known).verdict


def test_bisect_tries_more_seeds_if_the_first_do_not_fail(tmp_path: Path) -> None:
    found = bisect(lab(lambda case: PARTS["experts"](case) and case.seed % 6 == 5), BASE, tmp_path)
    assert found.blame.guilty == ("experts",)


@pytest.mark.parametrize("verdict", [Verdict.HANG, Verdict.RANK_FAULT])
def test_bisect_tries_a_rank_loss_twice_with_a_short_timeout(verdict: Verdict, tmp_path: Path) -> None:
    seen: list[Case] = []

    class Lossy(PretendedLab):
        def run(self, cases: Iterable[Case]) -> list[Report]:
            wanted = list(cases)
            seen.extend(wanted)
            return [report_of(case, self._rule(case), verdict) for case in wanted]

    patient = msgspec.structs.replace(BASE, timeout=300.0)
    laboratory = cast(Lab, Lossy(lambda case: "stuck" if PARTS["experts"](case) else ""))
    found = bisect(laboratory, patient, tmp_path, report_of(patient, "stuck", verdict))
    assert found.blame.guilty == ("experts",)
    assert found.base.failing.tried == 2
    if verdict is Verdict.HANG:
        assert found.base.what == "time limits of at most 5 s"
        assert {case.timeout for case in seen} == {5.0}


@pytest.mark.parametrize("part", ["transport", "experts"])
def test_bisect_repeats_an_intermittent_fault_until_a_cure_is_significant(part: str, tmp_path: Path) -> None:
    found = bisect(lab(lambda case: PARTS[part](case) and case.seed % 3 == 0), BASE, tmp_path)
    assert found.blame.guilty == (part,)
    assert "intermittent, fails on" in found.verdict
    assert found.base.failing.low < 1 / 3 < found.base.failing.high
    assert all(result.failing.tried >= 15 for result in found.results if result.cured)


@pytest.mark.parametrize("lucky", [(3, 4), (0, 4, 5, 9)])
def test_consecutive_failures_of_an_intermittent_fault_blame_no_innocent_part(
    lucky: tuple[int, ...], tmp_path: Path
) -> None:
    """Three consecutive failures are weak evidence: a rate of 60 % gives them in 22 of 100 cases."""

    def fails(case: Case) -> bool:
        # The swapped part is not guilty, and its first seeds pass by chance.
        innocent_luck = case.limit == "off" and case.seed < 3
        return PARTS["experts"](case) and case.seed % 10 not in lucky and not innocent_luck

    found = bisect(lab(fails), BASE, tmp_path)
    assert found.blame.guilty == ("experts",)
    assert found.blame.needs == ()
    assert found.trials >= 6
    assert f"cured is what passes {found.trials} times in a row, by luck in less than 2.5 %" in found.verdict


def test_failure_in_every_trial_is_reported_with_its_confidence_interval(tmp_path: Path) -> None:
    found = bisect(lab(PARTS["experts"]), BASE, tmp_path)
    assert "fails on 5 of 5, 47.8 to 100 %" in found.verdict
    assert found.trials == 6
    assert [result.failing.tried for result in found.results if result.cured] == [6]


def test_no_part_is_blamed_for_a_failure_too_rare_to_test(tmp_path: Path) -> None:
    found = bisect(lab(lambda case: PARTS["experts"](case) and case.seed == 0), BASE, tmp_path)
    assert found.blame.guilty == ()
    assert "fails too rarely to tell a cure from luck in 64 seeds" in found.verdict


def test_bisect_of_a_case_without_swappable_parts_is_refused(tmp_path: Path) -> None:
    case = tiny_case(limit="off", slot_order="source")
    with pytest.raises(InvalidCase, match="nothing in this case can be swapped"):
        bisect(lab(lambda _: True), case, tmp_path)


LARGE = tiny_case(8, tokens=300, num_experts=64, topk=4, hidden_size=512, max_dispatch_tokens_per_rank=512)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(1, 4), st.sampled_from([8, 64, 130, 512]))
def test_shrink_reduces_a_case_to_what_its_fault_needs(ranks: int, tokens: int, topk: int, hidden: int) -> None:
    def fails(case: Case) -> bool:
        enough = case.ep_size >= ranks and sum(case.tokens) >= tokens
        return enough and case.topk >= topk and case.hidden_size >= hidden

    found = shrink(lab(fails), LARGE, lambda _: None).case
    assert fails(found)
    assert (found.topk, found.hidden_size) == (topk, hidden)
    assert ranks <= found.ep_size <= ranks + 1  # with one rank less, exact inputs may not cover all columns
    assert sum(found.tokens) == tokens


def test_shrink_rejects_a_smaller_case_with_another_cause() -> None:
    def cause(case: Case) -> str:
        return "the fault" if case.ep_size > 2 else "another fault"

    steps: list[Step] = []
    found = shrink(lab(cause), LARGE, steps.append)
    assert found.case.ep_size == 3
    assert found.same.cause == found.report.diagnosis[0].cause == "the fault"
    assert [step.case for step in steps][-1] == found.case


def several(case: Case, *causes: str) -> Report:
    named = [
        Diagnosis(cause=cause, confidence="certain", evidence="made up", stage=cause.split(":")[0]) for cause in causes
    ]
    both = Diagnosis(cause=SEVERAL, confidence="likely", evidence="made up")
    return replace(report_of(case, SEVERAL), diagnosis=[both, *named])


def test_signature_of_several_faults_contains_all_causes() -> None:
    found = signature(several(LARGE, "dispatch: zeros", "combine: multiplied by 4"))
    assert found.cause == "several faults at once: combine: multiplied by 4; dispatch: zeros"
    assert found == signature(several(LARGE, "combine: multiplied by 4", "dispatch: zeros"))
    assert found != signature(several(LARGE, "dispatch: zeros", "experts: zeros"))
    assert found != signature(several(LARGE, "dispatch: zeros", "combine: multiplied by 4", "experts: zeros"))


def test_shrink_keeps_all_of_several_faults() -> None:
    class Three(PretendedLab):
        def run(self, cases: Iterable[Case]) -> list[Report]:
            return [self._several(case) for case in cases]

        def _several(self, case: Case) -> Report:
            causes = ["dispatch: zeros", "experts: zeros"]
            return several(case, *causes, *(["combine: zeros"] if case.topk > 2 else []))

    assert shrink(cast(Lab, Three(lambda _: "")), LARGE, lambda _: None).case.topk == 3


def test_shrink_keeps_the_distance_of_a_limit_to_max_recv() -> None:
    limit = LimitReport(
        requested="100", effective=100, source="flag", policy="unchecked", safe=False, max_recv=130, sum_tokens=0
    )

    class UnderLimit(PretendedLab):
        def run(self, cases: Iterable[Case]) -> list[Report]:
            return [replace(report, limit=limit) for report in super().run(cases)]

    def cause(case: Case) -> str:
        return "short" if case.limit in ("100", "max-recv-30") and (case.limit != "100" or case.tokens[0] > 99) else ""

    found = shrink(
        cast(Lab, UnderLimit(cause)), tiny_case(8, tokens=300, limit="100", max_dispatch_tokens_per_rank=512), print
    )
    assert found.case.limit == "max-recv-30"
    assert sum(found.case.tokens) == 1  # without lost rows this limit has no meaning


def test_shrink_of_a_passing_case_is_refused() -> None:
    with pytest.raises(InvalidCase, match="does not fail here"):
        shrink(lab(lambda _: False), LARGE, lambda _: None)


def test_shrink_of_a_rank_loss_runs_one_case_per_launch() -> None:
    class Fatal(PretendedLab):
        batches: list[int]

        def run(self, cases: Iterable[Case]) -> list[Report]:
            wanted = list(cases)
            self.batches = [*getattr(self, "batches", []), len(wanted)]
            return [report_of(case, self._rule(case), Verdict.RANK_FAULT) for case in wanted]

    fatal = Fatal(lambda case: "died" if case.ep_size > 1 else "")
    assert shrink(cast(Lab, fatal), LARGE, lambda _: None).case.ep_size == 2
    assert set(fatal.batches) == {1}
