"""Bisection by stage: remove one stage or swap in a trusted one; a stage whose swap cures the failure is guilty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec

from distbench.case.identity import case_hash
from distbench.case.injection import parse_inject
from distbench.case.plugins import is_trusted
from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.errors import InvalidCase, Verdict
from distbench.experts import make_selector
from distbench.experts.selection.pinned_table import pinned_table
from distbench.report.files import write_atomically
from distbench.report.schema import Report
from distbench.tools.lab import HANG_S, Lab, impatient, possible, signature, varied
from distbench.utils.stats import Rate, trials_to_see

MAX_TRIALS = 64
_TRIALS = 5
# Each failure of these costs a launch, or a time limit as well. Two in a row say less; cures cost little, so take more.
_COSTLY = (Verdict.HANG, Verdict.RANK_FAULT)
_FEW_TRIALS = 2
_CONDITIONS = ("kernel", "truncate", "row order", "dispatch dtype")
_PINNED = "pinned.csv"


class Swap(msgspec.Struct, frozen=True):
    """A trusted part that replaces an untrusted one: the stage, the replacement, and the changed keys.

    Faults injected into `stages` are removed with the replaced part.
    """

    part: str
    what: str
    changes: dict[str, Any] = {}
    stages: tuple[str, ...] = ()


Pick = tuple[Swap, ...]
"""One swap, or two made together."""


class SwapResult(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of one or two swaps: how often the case still failed, over seeds from the case's own up, and how."""

    parts: tuple[str, ...]
    what: str
    failing: Rate
    endings: list[str]
    cured: bool


class Blame(msgspec.Struct, frozen=True):
    """Guilty parts, and the conditions without which the failure does not show.

    Several guilty parts interact where each single swap cures: all of them have to be present. They are `independent`
    where only their swaps together cure: each part alone breaks the case.
    """

    guilty: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    independent: bool = False

    def __str__(self) -> str:
        """The guilty parts and the conditions of the failure, as one line."""
        names = " and ".join(self.guilty)
        if self.independent:
            return f"{names} are guilty, each by itself: only both swaps together cure it"
        found = f"{names} interact: each swap alone cures it" if len(self.guilty) > 1 else f"{names} is guilty"
        return f"{found}, and shows only with this {' and '.join(self.needs)}" if self.needs else found


class Accusation(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a bisection: the blame and all results.

    A cure has passed `trials` times in a row. `blame` is empty where the case did not fail, where neither a swap nor a
    pair of swaps cures it, or where a cure may be luck. `recorded` is the signature in the given report.
    """

    base: SwapResult
    results: list[SwapResult]
    blame: Blame
    trials: int
    launches: int
    recorded: str = ""

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        failing = self.base.failing
        if not failing.seen:
            return f"the case does not fail here: fails on {failing}{self._not_as_recorded}"
        rate = f"; {'' if failing.always else 'intermittent, '}fails on {failing}"
        return f"{self._finding(failing)}{rate}{self._cured_by}{self._not_as_recorded}"

    def _finding(self, failing: Rate) -> str:
        if trials_to_see(failing.low) > self.trials:
            return f"it fails too rarely to tell a cure from luck in {self.trials} seeds"
        return str(self.blame) if self.blame.guilty else "no swap and no pair of swaps cures it"

    @property
    def _cured_by(self) -> str:
        if not self.blame.guilty:
            return ""
        return f"; cured is what passes {self.trials} times in a row, by luck in less than 2.5 % of all cases"

    @property
    def _not_as_recorded(self) -> str:
        if not self.recorded or self.recorded in self.base.endings:
            return ""
        return f"; its report says {self.recorded}, here it ends in {'; '.join(self.base.endings)}"


def bisect(  # noqa: PLR0913 - the case, what is known of it, and how it is tried
    lab: Lab,
    case: Case,
    folder: Path,
    known: Report | None = None,
    seeds: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Accusation:
    """Find the guilty part of a failing case. `folder` takes the kernel table that pins one kernel.

    The case runs with several seeds, and with more where only some of them fail, or none. A swap counts as a cure once
    it has passed often enough that a failure at the lowest plausible rate would have shown, at odds of 39 to 1. Where
    no swap cures, pairs are tried. A lost rank costs another launch, a hang its time limit, which is lowered. `known`
    is a report of the case. `seeds` is the largest number of seeds tried for a failure (None: MAX_TRIALS). `tell`
    receives a progress line before each step.

    Raises:
        InvalidCase: nothing in the case can be swapped, or its report says PASS and no number of seeds was given.

    """
    if known is not None and not known.exit_code and seeds is None:
        message = (
            f"the report says {known.verdict.value}: no stage is to blame; give the report of a case that fails, or "
            "--seeds N to try N seeds for a failure"
        )
        raise InvalidCase(message)
    swaps = swaps_of(case, folder)
    if not swaps:
        message = "nothing in this case can be swapped: no limit, no other transport or experts, no fault, bf16"
        raise InvalidCase(message)
    tell("the case as given")
    first = signature(known or lab.run([case])[0])
    limited = ""
    if first.verdict is Verdict.HANG:
        case, limited = impatient(case), f"time limits of at most {HANG_S:g} s"
    base = _base(lab, case, _FEW_TRIALS if first.verdict in _COSTLY else _TRIALS, seeds or MAX_TRIALS, tell)
    base = msgspec.structs.replace(base, what=limited)
    recorded = "" if known is None else str(first)
    if not base.failing.seen:
        return Accusation(base=base, results=[], blame=Blame(), trials=0, launches=lab.launches, recorded=recorded)
    needed = trials_to_see(base.failing.low)
    trials = min(needed, MAX_TRIALS)
    picks: list[Pick] = [(swap,) for swap in swaps]
    results = _tried(lab, case, picks, trials, tell)
    if not any(result.cured for result in results):
        pairs = list(combinations(swaps, 2))
        picks += pairs
        results += _tried(lab, case, pairs, trials, tell)
    cures = [picked for picked, result in zip(picks, results, strict=True) if result.cured and trials >= needed]
    return Accusation(
        base=base, results=results, blame=blame(cures), trials=trials, launches=lab.launches, recorded=recorded
    )


def _base(lab: Lab, case: Case, trials: int, most: int, tell: Callable[[str], None]) -> SwapResult:
    """Failure rate of the case, over trials that grow until the lowest plausible rate would show in them."""
    trials = min(trials, most)
    while True:
        tell(f"as given, with {trials} seeds of at most {most}")
        base = _result(lab, case, (), trials)
        rate = base.failing
        known = bool(rate.seen) and (rate.always or trials_to_see(rate.low) <= trials)
        if known or trials >= most:
            return base
        trials = min(2 * trials, most)


def blame(cures: Sequence[Pick]) -> Blame:
    """Parts to blame, given `cures` in order of `swaps_of`: single swaps that cure, or pairs where none does.

    Replacing a part removes its bugs. Changing limit, kernel, order or dtype may only remove a condition that bugs
    elsewhere need. A part whose swap also replaces a guilty part's stage cures for that reason, and is not named.
    """
    if not cures:
        return Blame()
    if len(cures[0]) > 1:
        return Blame(tuple(swap.part for swap in cures[0]), independent=True)
    singles = [swap for (swap,) in cures]
    guilty: list[Swap] = []
    for swap in singles:
        wider = any(set(one.stages) <= set(swap.stages) for one in guilty)
        if swap.part not in _CONDITIONS and not wider:
            guilty.append(swap)
    guilty = guilty or singles[:1]
    needs = [swap.part for swap in singles if swap.part in _CONDITIONS and swap not in guilty]
    return Blame(tuple(swap.part for swap in guilty), tuple(needs))


def swaps_of(case: Case, folder: Path) -> list[Swap]:
    """Swaps that change `case` and leave a valid one, the most informative first."""
    swaps = [
        Swap("dispatch", "no fault injected there", stages=(Stage.DISPATCH,)),
        Swap("combine", "no fault injected there", stages=(Stage.COMBINE,)),
        Swap(
            "transport",
            "collective",
            {"transport": "collective", "transport_option": ""},
            (Stage.DISPATCH, Stage.COMBINE),
        ),
        Swap("experts", "reference", {"experts": "reference", "experts_option": ""}, (Stage.EXPERTS,)),
        *_pinned(case, folder / _PINNED),
        Swap("truncate", "limit off", {"limit": "off", "recv_bound": False}, (Stage.TRUNCATE,)),
        Swap("gather", "no fault injected there", stages=(Stage.GATHER,)),
        Swap("row order", "by source", {"slot_order": "source"}),
        Swap("dispatch dtype", "bf16", {"dispatch_dtype": "bf16"}),
    ]
    if case.transport == "collective":
        swaps = [swap for swap in swaps if swap.part != "transport"]
    return [swap for swap in swaps if case_hash(case) not in map(case_hash, _swapped(case, (swap,)))]


def _faults_elsewhere(case: Case, stages: Sequence[str]) -> str:
    """Faults injected into stages other than `stages`: a replaced stage loses its faults."""
    if not case.inject:
        return ""
    from distbench.faults.injector import fault_kind, is_plugin  # noqa: PLC0415 - loads torch

    kept = []
    for text, fault in zip(filter(str.strip, case.inject.split(";")), parse_inject(case.inject), strict=True):
        if is_plugin(fault) or fault.options.get("stage", fault_kind(fault).stage) not in stages:
            kept.append(text)
    return ";".join(kept)


def _pinned(case: Case, path: Path) -> list[Swap]:
    """The swap that runs the padded arm's kernel for any number of rows, where a table can name that kernel.

    A kernel chosen by heuristics has a distbench name, which only the reference experts know.
    """
    if not is_trusted("experts", case.experts):
        return []
    selector = make_selector(case)
    kernel = selector.choose(case.capacity)
    write_atomically(path, pinned_table(selector, kernel))
    swap = Swap("kernel", f"{kernel.label}, whatever the rows", {"kernel_table": str(path)})
    nameable = kernel.source == "tuned" or case.experts == "reference"
    if not nameable or case.limit == "off":
        return []
    pinned = [make_selector(variant).choose(1) for variant in _swapped(case, (swap,))]
    return [swap] if all(kernel.same_kernel(one) for one in pinned) else []


def _swapped(case: Case, picked: Pick) -> list[Case]:
    """The case with the swaps made; empty where that is no valid case."""
    changes = {key: value for swap in picked for key, value in swap.changes.items()}
    stages = [stage for swap in picked for stage in swap.stages]
    return possible(case, **changes, inject=_faults_elsewhere(case, stages))


def _seeds(case: Case, trials: int) -> list[Case]:
    """The case with its own seed and the following ones: other bits, same configuration."""
    return [varied(case, seed=case.seed + trial) for trial in range(trials)]


def _tried(lab: Lab, case: Case, picks: Sequence[Pick], trials: int, tell: Callable[[str], None]) -> list[SwapResult]:
    """Run every pick once in one launch, then possible cures in a second one, as often as a cure requires."""
    known = [(picked, variant) for picked in picks for variant in _swapped(case, picked)]
    tell(f"{len(known)} swaps of {'two parts' if len(picks[0]) > 1 else 'one part'}, once each")
    lab.run([variant for _, variant in known])
    passing = [not lab.run([variant])[0].exit_code for _, variant in known]
    tell(f"{sum(passing)} swaps that may cure, with {trials} seeds each")
    lab.run([one for (_, variant), cure in zip(known, passing, strict=True) if cure for one in _seeds(variant, trials)])
    return [
        _result(lab, variant, picked, trials if cure else 1)
        for (picked, variant), cure in zip(known, passing, strict=True)
    ]


def _result(lab: Lab, variant: Case, picked: Pick, trials: int) -> SwapResult:
    reports = lab.run(_seeds(variant, trials))
    failing = Rate(sum(bool(report.exit_code) for report in reports), trials)
    return SwapResult(
        parts=tuple(swap.part for swap in picked),
        what=", ".join(swap.what for swap in picked),
        failing=failing,
        endings=list(dict.fromkeys(str(signature(report)) for report in reports)),
        cured=bool(picked) and not failing.seen,
    )
