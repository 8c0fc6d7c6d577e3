"""bisect and shrink over a laboratory that only pretends: which case fails is a rule of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from distbench.bisect import Blame, bisect
from distbench.case import Case, case_hash
from distbench.errors import InvalidCase, Verdict
from distbench.report.document import Report
from distbench.report.limit import LimitReport
from distbench.shrink import Step, shrink
from distbench.trials import Lab, signature
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
def test_a_single_part_is_named(part: str, tmp_path: Path) -> None:
    found = bisect(lab(PARTS[part]), BASE, tmp_path)
    assert found.blame.guilty == (part,)
    assert not found.blame.needs
    assert found.launches == 4  # batches: the case, its other seeds, the swaps, those that may be cures


def test_a_kernel_that_only_the_cut_selects_is_named(tmp_path: Path) -> None:
    case = tiny_case(limit="48", kernel_table="tests/data/splitk.csv")
    found = bisect(lab(lambda case: case.limit != "off" and "splitk" in case.kernel_table), case, tmp_path)
    assert found.blame.guilty == ("kernel",)
    assert found.blame.needs == ("truncate",)


def test_what_a_guilty_part_needs_to_show_is_said(tmp_path: Path) -> None:
    found = bisect(lab(lambda case: PARTS["experts"](case) and PARTS["truncate"](case)), BASE, tmp_path)
    assert found.blame.guilty == ("experts",)
    assert found.blame.needs == ("truncate",)
    assert "shows only with this truncate" in found.verdict


@pytest.mark.parametrize("pair", [("transport", "experts"), ("experts", "truncate"), ("truncate", "dispatch dtype")])
def test_two_independent_faults_are_both_named(pair: tuple[str, str], tmp_path: Path) -> None:
    found = bisect(lab(lambda case: any(PARTS[part](case) for part in pair)), BASE, tmp_path)
    assert found.blame == Blame(pair, independent=True)
    assert f"{pair[0]} and {pair[1]} are guilty, each by itself" in found.verdict


def test_parts_whose_swaps_cure_singly_interact(tmp_path: Path) -> None:
    needed = ("transport", "experts", "truncate")
    found = bisect(lab(lambda case: all(PARTS[part](case) for part in needed)), BASE, tmp_path)
    assert found.blame == Blame(("transport", "experts"), ("truncate",))
    assert (
        "transport and experts interact: each swap alone cures it, and shows only with this truncate" in found.verdict
    )


def test_a_swap_that_takes_the_guilty_stage_away_as_well_is_not_named(tmp_path: Path) -> None:
    case = tiny_case(transport="mori", emulate=True, inject="flipped-bit:rank=1")
    found = bisect(lab(lambda case: "flipped-bit" in case.inject), case, tmp_path)
    assert [result.parts for result in found.results if result.cured] == [("dispatch",), ("transport",)]
    assert found.blame == Blame(("dispatch",))


def test_nobody_is_blamed_for_what_no_pair_cures(tmp_path: Path) -> None:
    found = bisect(lab(lambda _: True), BASE, tmp_path)
    assert found.blame.guilty == ()
    assert "no swap and no pair" in found.verdict


def test_a_case_that_does_not_fail(tmp_path: Path) -> None:
    found = bisect(lab(lambda _: False), BASE, tmp_path)
    assert found.blame.guilty == ()
    assert found.verdict == "the case does not fail here: fails on 0 of 64, 0 to 5.6 %"


def test_a_report_is_held_against_what_happens_here(tmp_path: Path) -> None:
    known = report_of(BASE, "broken")
    found = bisect(lab(lambda _: False), BASE, tmp_path, known)
    assert found.verdict.endswith("0 to 5.6 %; its report says CORRUPT, broken, here it ends in PASS")
    found = bisect(lab(lambda case: PARTS["experts"](case) and "otherwise"), BASE, tmp_path, known)
    assert found.blame.guilty == ("experts",)
    assert found.verdict.endswith("; its report says CORRUPT, broken, here it ends in CORRUPT, otherwise")
    assert "its report" not in bisect(lab(PARTS["experts"]), BASE, tmp_path, known).verdict


def test_a_failure_that_the_first_seeds_miss_is_looked_for_with_more(tmp_path: Path) -> None:
    found = bisect(lab(lambda case: PARTS["experts"](case) and case.seed % 6 == 5), BASE, tmp_path)
    assert found.blame.guilty == ("experts",)


@pytest.mark.parametrize("verdict", [Verdict.HANG, Verdict.RANK_FAULT])
def test_what_loses_its_ranks_is_tried_twice_and_hangs_not_for_long(verdict: Verdict, tmp_path: Path) -> None:
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
def test_an_intermittent_fault_is_tried_until_a_cure_can_be_told_from_luck(part: str, tmp_path: Path) -> None:
    found = bisect(lab(lambda case: PARTS[part](case) and case.seed % 3 == 0), BASE, tmp_path)
    assert found.blame.guilty == (part,)
    assert "intermittent, fails on" in found.verdict
    assert found.base.failing.low < 1 / 3 < found.base.failing.high
    assert all(result.failing.tried >= 15 for result in found.results if result.cured)


@pytest.mark.parametrize("lucky", [(3, 4), (0, 4, 5, 9)])
def test_what_fails_a_few_times_in_a_row_is_not_taken_for_permanent(lucky: tuple[int, ...], tmp_path: Path) -> None:
    """Three failures in a row say little of a rate: one of 60 % has them in 22 of 100 cases."""

    def fails(case: Case) -> bool:
        # The swapped part is innocent, and passes with its first seeds by luck.
        innocent_luck = case.limit == "off" and case.seed < 3
        return PARTS["experts"](case) and case.seed % 10 not in lucky and not innocent_luck

    found = bisect(lab(fails), BASE, tmp_path)
    assert found.blame.guilty == ("experts",)
    assert found.blame.needs == ()
    assert found.trials >= 6
    assert f"cured is what passes {found.trials} times in a row, by luck in less than 2.5 %" in found.verdict


def test_a_failure_that_never_missed_is_told_with_its_bounds(tmp_path: Path) -> None:
    found = bisect(lab(PARTS["experts"]), BASE, tmp_path)
    assert "fails on 5 of 5, 47.8 to 100 %" in found.verdict
    assert found.trials == 6
    assert [result.failing.tried for result in found.results if result.cured] == [6]


def test_nobody_is_guilty_of_what_fails_too_rarely(tmp_path: Path) -> None:
    found = bisect(lab(lambda case: PARTS["experts"](case) and case.seed == 0), BASE, tmp_path)
    assert found.blame.guilty == ()
    assert "fails too rarely to tell a cure from luck in 64 seeds" in found.verdict


def test_nothing_to_swap_is_refused(tmp_path: Path) -> None:
    case = tiny_case(limit="off", slot_order="source")
    with pytest.raises(InvalidCase, match="nothing in this case can be swapped"):
        bisect(lab(lambda _: True), case, tmp_path)


LARGE = tiny_case(8, tokens=300, num_experts=64, topk=4, hidden_size=512, max_dispatch_tokens_per_rank=512)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(1, 4), st.sampled_from([8, 64, 130, 512]))
def test_shrinks_to_what_the_fault_needs(ranks: int, tokens: int, topk: int, hidden: int) -> None:
    def fails(case: Case) -> bool:
        enough = case.ep_size >= ranks and sum(case.tokens) >= tokens
        return enough and case.topk >= topk and case.hidden_size >= hidden

    found = shrink(lab(fails), LARGE, lambda _: None).case
    assert fails(found)
    assert (found.topk, found.hidden_size) == (topk, hidden)
    assert ranks <= found.ep_size <= ranks + 1  # with one rank less, exact inputs may not cover all columns
    assert sum(found.tokens) == tokens


def test_never_takes_another_failure_for_the_same() -> None:
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


def test_several_faults_are_the_same_only_with_all_of_their_causes() -> None:
    found = signature(several(LARGE, "dispatch: zeros", "combine: multiplied by 4"))
    assert found.cause == "several faults at once: combine: multiplied by 4; dispatch: zeros"
    assert found == signature(several(LARGE, "combine: multiplied by 4", "dispatch: zeros"))
    assert found != signature(several(LARGE, "dispatch: zeros", "experts: zeros"))
    assert found != signature(several(LARGE, "dispatch: zeros", "combine: multiplied by 4", "experts: zeros"))


def test_shrinking_keeps_every_one_of_several_faults() -> None:
    class Three(PretendedLab):
        def run(self, cases: Iterable[Case]) -> list[Report]:
            return [self._several(case) for case in cases]

        def _several(self, case: Case) -> Report:
            causes = ["dispatch: zeros", "experts: zeros"]
            return several(case, *causes, *(["combine: zeros"] if case.topk > 2 else []))

    assert shrink(cast(Lab, Three(lambda _: "")), LARGE, lambda _: None).case.topk == 3


def test_a_limit_stays_as_far_from_the_rows_received() -> None:
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
    assert sum(found.case.tokens) == 1  # with none this limit makes no sense


def test_a_case_that_passes_cannot_be_shrunk() -> None:
    with pytest.raises(InvalidCase, match="does not fail here"):
        shrink(lab(lambda _: False), LARGE, lambda _: None)


def test_a_lost_rank_is_shrunk_one_launch_at_a_time() -> None:
    class Fatal(PretendedLab):
        batches: list[int]

        def run(self, cases: Iterable[Case]) -> list[Report]:
            wanted = list(cases)
            self.batches = [*getattr(self, "batches", []), len(wanted)]
            return [report_of(case, self._rule(case), Verdict.RANK_FAULT) for case in wanted]

    fatal = Fatal(lambda case: "died" if case.ep_size > 1 else "")
    assert shrink(cast(Lab, fatal), LARGE, lambda _: None).case.ep_size == 2
    assert set(fatal.batches) == {1}
