"""Kinds of inputs with which a case runs: exact, gaussian, or both in turn."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from distbench.case.spec import Case


def inputs_of(case: Case) -> tuple[Literal["exact", "gaussian"], ...]:
    """The kinds of inputs that a case runs with, in order."""
    return ("exact", "gaussian") if case.numerics == "both" else (case.numerics,)


def with_inputs(case: Case, inputs: Literal["exact", "gaussian"]) -> Case:
    """The part of a case that runs with one kind of inputs.

    With both, exact inputs decide bits. Gaussian inputs decide errors only: they run once, untimed, and may not repeat.
    """
    if case.numerics != "both":
        return case
    if inputs == "exact":
        return msgspec.structs.replace(case, numerics=inputs)
    once: dict[str, Any] = {"repeats": 1, "until_failure": False, "iterations": 0}
    return msgspec.structs.replace(case, numerics=inputs, require="tolerance", **once)


def repeats_of(case: Case) -> int:
    """Repeats of the arms with all kinds of inputs together."""
    return sum(with_inputs(case, kind).repeats for kind in inputs_of(case))
