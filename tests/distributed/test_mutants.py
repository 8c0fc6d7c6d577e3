"""The corpus: each mutant changes bits, a subtle one touches little, and an equivalent one changes no verdict."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest

from distbench.case.spec import Case
from distbench.errors import Verdict
from distbench.faults.mutants import CLASSES, CORPUS
from distbench.faults.mutants.corpus import SPARSE
from distbench.pipeline.run_case import run_case
from distbench.report.document import build_report
from distbench.report.environment import capture_environment
from distbench.report.schema import Report
from distbench.tools.mutants.plan import NUMERICS, RANKS, plan
from distbench.verify.records import Outcome
from tests.distributed.mutant_runs import Touch, touches_of
from tests.ranks import on_ranks

SOME = 40
"""Mutants of one call on the ranks, which have a time limit."""
SETTINGS = ("bf16", "fp8")
ARGUMENT_SETTINGS = ("gelu", "limit", "weights first", "bias fp8", "gpt-oss")
HARMLESS = [name for name, mutant in CORPUS.items() if mutant.equivalent]
# An atomic or another kernel may change the bits of gaussian inputs in one run and not in the next.
MAY_VARY = {Verdict.PASS, Verdict.NONDETERMINISTIC, Verdict.DRIFT}
# They change what the experts have read already.
OVERWRITING = {
    "input-overwritten",
    "output-in-place-of-the-input",
    "ids-made-local-in-place",
    "live-count-overwritten",
    "one-routing-weight-overwritten",
    "one-weight-overwritten",
}
# No bit changes in one pass: the mutant is equivalent here, or no row is stale.
UNCHANGED = {*HARMLESS, "tokens-of-the-last-pass", "ids-of-the-first-call", *OVERWRITING}
# No input of the workload reaches the defect; the mutant declares it, and the bench counts it as not detected.
NOT_REACHED = {"bf16": set[str](), "fp8": {"gate-clamped-at-64"}}


@cache
def touches(setting: str) -> list[dict[str, Touch]]:
    return touched(setting, "gaussian", [name for name, one in CORPUS.items() if setting in one.settings])


def touched(setting: str, numerics: str, names: list[str]) -> list[dict[str, Touch]]:
    clean = next(
        run
        for run in plan(RANKS, 1, ["scales", "tiles", "arguments"]).runs
        if run.setting == setting and not run.mutant
    )
    case = msgspec.structs.replace(clean.entry.case, numerics=numerics, slot_order="source", limit="off")
    found: list[dict[str, Touch]] = [{} for _ in range(RANKS)]
    for start in range(0, len(names), SOME):
        for rank, new in enumerate(on_ranks(RANKS, touches_of, case, names[start : start + SOME])):
            found[rank] |= new
    return found


def without_effect(by_rank: list[dict[str, Touch]]) -> set[str]:
    return {name for name in by_rank[0] if not any(ranks[name].changed for ranks in by_rank)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_mutant_not_declared_unchanged_changes_bits(setting: str) -> None:
    unchanged = without_effect(touches(setting)) - UNCHANGED - NOT_REACHED[setting]
    assert without_effect(touched(setting, "exact", sorted(unchanged))) == set()


@pytest.mark.parametrize("setting", ARGUMENT_SETTINGS)
def test_every_mutant_of_an_argument_changes_bits(setting: str) -> None:
    names = [name for name, one in CORPUS.items() if setting in one.settings]
    unseen = sorted(without_effect(touched(setting, "exact", names)))
    assert without_effect(touched(setting, "gaussian", unseen) if unseen else [{}]) == set()
    assert set(unseen) <= {"bias-in-bf16", "silu-in-the-last-column"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_subtle_mutant_changes_at_most_one_row_in_64_or_one_percent_of_elements(setting: str) -> None:
    for ranks in touches(setting):
        kinds = {name: CORPUS[name].touches for name in ranks}
        much = {name: touch for name, touch in ranks.items() if kinds[name] == "row" and touch.rows > 1 / SPARSE}
        much |= {name: touch for name, touch in ranks.items() if kinds[name] == "elements" and touch.elements > 0.01}
        assert not much


def report_of(case: Case) -> Report:
    outcome: Outcome = on_ranks(RANKS, run_case, case)[0]
    [entry] = [run.entry for run in plan(RANKS, 1, ["cut"]).runs[:1]]
    entry = msgspec.structs.replace(entry, case=case)
    return build_report(entry, outcome, environment=capture_environment({}, [], []), wall_s=0.0)


@pytest.mark.parametrize("name", HARMLESS)
def test_equivalent_mutant_raises_no_alarm(name: str) -> None:
    runs = [run for run in plan(RANKS, 1, [name]).runs if run.mutant and run.arm == "truncated"]
    assert {run.numerics for run in runs} == set(NUMERICS)
    for run in runs:
        report = report_of(run.entry.case)
        assert report.injected[0].hits
        assert report.verdict in ({Verdict.PASS} if run.numerics == "exact" else MAY_VARY), run.entry.name


def test_mutant_of_the_truncated_arm_reports_the_verdicts_of_public_rules() -> None:
    [run] = [
        run
        for run in plan(RANKS, 1, ["last-columns-lost"]).runs
        if (run.arm, run.numerics, run.setting) == ("truncated", "gaussian", "bf16")
    ]
    accepted = report_of(run.entry.case).injected[0].accepted
    assert accepted["aiter"]
    assert not accepted["vllm"]
    everywhere = msgspec.structs.replace(run.entry.case, inject=run.entry.case.inject.partition(",")[0])
    assert report_of(everywhere).injected[0].accepted == {}


def test_mutants_that_no_input_reaches_are_declared_unseen() -> None:
    assert all(CORPUS[name].unseen for names in NOT_REACHED.values() for name in names)


def test_each_mutant_class_has_eight_mutants_and_a_third_of_all_are_subtle() -> None:
    broken = [mutant for one in CLASSES for mutant in one.mutants if not mutant.equivalent]
    assert len(CORPUS) == sum(len(one.mutants) for one in CLASSES)
    assert len(broken) >= 150
    assert all(sum(not mutant.equivalent for mutant in one.mutants) >= 8 for one in CLASSES)
    assert sum(mutant.subtle for mutant in broken) * 3 >= len(broken)
