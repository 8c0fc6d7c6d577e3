"""Replay of a bundle's case, and the differences between this run and the recorded one."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from distbench.case.spec import UNSTORED_KEYS
from distbench.report.schema import Report
from distbench.tools.lab import signature
from distbench.utils.text import counted
from distbench.verify.records import Reason

# "model" is a label of the dimensions, which are compared themselves.
_IGNORED_KEYS = (*UNSTORED_KEYS, "hash", "kernel_table", "model")


class Difference(msgspec.Struct, frozen=True):
    """One difference: its subject, as recorded, and here."""

    what: str
    recorded: str
    here: str


class ReplayOutcome(msgspec.Struct, frozen=True):
    """Whether the same failure was reproduced, and all differences, the most important first."""

    reproduced: bool
    differences: list[Difference]


def compare(recorded: Report, here: Report) -> ReplayOutcome:
    """Comparison of a run here with the recorded one.

    Reproduced means the same verdict, first wrong stage, rank and arm, and most certain cause; where no stage was
    judged, the same rank in the same stage of the first reason. Bits are compared by the digests of each arm on each
    rank, and may differ where kernels do; results of different inputs are not compared.
    """
    outcome = [
        *_differ("ending", str(signature(recorded)), str(signature(here))),
        *_differ("first wrong place", _first_place(recorded), _first_place(here)),
    ]
    inputs = list(_differ("version of the inputs", str(recorded.inputs_version), str(here.inputs_version)))
    details = [
        *inputs,
        *_causes(recorded, here),
        *_case(recorded, here),
        *_environment(recorded, here),
        *_ranks(recorded, here, bits=not inputs),
    ]
    return ReplayOutcome(not outcome, [*outcome, *details])


def _first_place(report: Report) -> str:
    first = report.first_divergence
    if first is not None:
        return f"arm {first.arm}, rank {first.rank}"
    reason = next(iter(report.reasons), Reason(code="", message=""))
    places = {"rank": reason.rank, "stage": reason.stage or None}
    return ", ".join(f"{name} {value}" for name, value in places.items() if value is not None) or "none"


def _causes(recorded: Report, here: Report) -> Iterator[Difference]:
    then, now = ("; ".join(found.cause for found in report.diagnosis) for report in (recorded, here))
    yield from _differ("diagnosis", then, now)


def _case(recorded: Report, here: Report) -> Iterator[Difference]:
    for key, value in here.case.items():
        if key not in _IGNORED_KEYS:
            yield from _differ(f"case: {key}", str(recorded.case.get(key, "unknown")), str(value))


def _environment(recorded: Report, here: Report) -> Iterator[Difference]:
    then, now = recorded.environment, here.environment
    yield from _differ("devices", ", ".join(then.devices), ", ".join(now.devices))
    for name, old, new in (
        ("version", then.versions, now.versions),
        ("commit", then.commits, now.commits),
        ("variable", then.variables, now.variables),
        ("system", then.system, now.system),
    ):
        for key in sorted({*old, *new}):
            yield from _differ(f"{name}: {key}", old.get(key, "none"), new.get(key, "none"))


def _ranks(recorded: Report, here: Report, *, bits: bool) -> Iterator[Difference]:
    """Yield, for each arm, the kernels and (with `bits`) the ranks whose bits differ from the recorded ones."""
    pairs = list(zip(recorded.ranks, here.ranks, strict=False))
    arms = dict.fromkeys(arm for then, _ in pairs for arm in then.digests)
    for arm in arms:
        then, now = (
            ", ".join(dict.fromkeys(str(rank.kernels.get(arm, {}).get("label", "none")) for rank in ranks))
            for ranks in zip(*pairs, strict=True)
        )
        yield from _differ(f"kernel of {arm}", then, now)
        other = [str(then.rank) for then, now in pairs if then.digests[arm] != now.digests.get(arm)]
        if other and bits:
            yield Difference(
                f"bits of {arm}", f"{counted(len(pairs), 'rank')}", f"other on rank {', '.join(other[:16])}"
            )


def _differ(what: str, recorded: str, here: str) -> Iterator[Difference]:
    if recorded != here:
        yield Difference(what, recorded, here)
