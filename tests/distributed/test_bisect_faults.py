"""bisect and shrink over real runs of every injected fault; the ranks stay up, so a launch costs nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import pytest

from distbench.case.entry import Entry
from distbench.case.identity import case_hash
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.faults.injector import FAULTS
from distbench.pipeline.run_case import run_case
from distbench.report.document import build_report
from distbench.report.environment import capture_environment
from distbench.report.schema import Report
from distbench.tools.bisect import Blame, bisect
from distbench.tools.lab import Lab, signature
from distbench.tools.shrink import shrink
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

RANKS = 4
LOST = ("hang", "death", "late-death", "dies-at-304-336")
HARMLESS = ("delay",)
# Ranks and tokens that a fault needs to be visible, if more than two ranks and four tokens.
NEEDS = {
    "cross-node": (4, 8, "two nodes of two ranks each, and six rows from afar to tell it from chance"),
}
SOAK = os.environ.get("DISTBENCH_SOAK") == "1"
SINGLE = [name for name, kind in FAULTS.items() if name not in (*LOST, *HARMLESS) and not kind.transport]


def run_on_some(session: Session, case: Case) -> Outcome | None:
    entered = session.enter(case.ep_size)
    outcome = run_case(session, case) if entered else None
    session.enter(session.world_size)
    return outcome


class PoolLab:
    """A laboratory on ranks that stay up."""

    def __init__(self) -> None:
        self._known: dict[str, Report] = {}
        self.launches = 0

    @property
    def cases(self) -> int:
        return len(self._known)

    def run(self, cases: Iterable[Case]) -> list[Report]:
        wanted = list(cases)
        self.launches += any(case_hash(case) not in self._known for case in wanted)
        for case in wanted:
            if case_hash(case) not in self._known:
                outcome = on_ranks(RANKS, run_on_some, case)[0]
                entry = Entry(name="trial", case=case, sources={})
                environment = capture_environment({}, [], [])
                self._known[case_hash(case)] = build_report(entry, outcome, environment=environment, wall_s=0.0)
        return [self._known[case_hash(case)] for case in wanted]

    def first(self, cases: Iterable[Case], wanted: Callable[[Report], bool]) -> Case | None:
        return next((case for case in cases if wanted(self.run([case])[0])), None)


def case_with(*names: str) -> Case:
    shape = {key: value for name in names for key, value in FAULTS[name].shape.items()}
    return tiny_case(RANKS, **shape | {"inject": ";".join(names)})


def lab() -> Lab:
    return cast(Lab, PoolLab())


@pytest.mark.parametrize("name", SINGLE if SOAK else SINGLE[::4])
def test_every_single_fault_is_bisected_to_its_stage(name: str, tmp_path: Path) -> None:
    found = bisect(lab(), case_with(name), tmp_path)
    assert found.blame.guilty == (FAULTS[name].stage,), [
        (one.parts, str(one.failing), one.endings) for one in found.results
    ]


@pytest.mark.parametrize(
    "pair", [("flipped-bit", "flipped-token-bit"), ("share-doubled", "zero-rows"), ("off-by-one", "swapped-rows")]
)
def test_two_faults_are_bisected_to_both_stages(pair: tuple[str, str], tmp_path: Path) -> None:
    found = bisect(lab(), case_with(*pair), tmp_path)
    assert set(found.blame.guilty) == {FAULTS[name].stage for name in pair}
    assert found.blame.independent


def test_fault_at_a_boundary_of_the_transport_is_not_blamed_on_the_transport(tmp_path: Path) -> None:
    case = tiny_case(RANKS, transport="mori", emulate=True, inject="flipped-bit:rank=1")
    assert bisect(lab(), case, tmp_path).blame == Blame(("dispatch",))


@pytest.mark.skipif(not SOAK, reason="minutes: set DISTBENCH_SOAK=1")
@pytest.mark.parametrize("name", SINGLE)
def test_every_single_fault_is_shrunk_to_a_case_that_shows_it(name: str) -> None:
    laboratory = lab()
    case = case_with(name)
    found = shrink(laboratory, case, lambda _: None)
    assert signature(found.report) == found.same == signature(laboratory.run([case])[0])
    ranks, tokens, _ = NEEDS.get(name, (2, 4, ""))
    assert found.case.ep_size <= ranks
    assert sum(found.case.tokens) <= tokens
