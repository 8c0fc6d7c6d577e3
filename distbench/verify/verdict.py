"""One verdict from the observations of all ranks: the most fundamental cause wins (docs/verdicts.md)."""

from __future__ import annotations

import msgspec

from distbench.case.kinds import inputs_of, with_inputs
from distbench.errors import Verdict
from distbench.verify.excuses import Part, any_outside, in_order, is_noise
from distbench.verify.records import Divergence, Finding, Gathered, Judgement, Reason, ResolvedCase
from distbench.verify.rules import RULES, limit_notes, notes, under_limit


def judge(resolved: ResolvedCase, gathered: Gathered) -> Judgement:
    """Return the verdict of a case whose ranks all reported, and every rule that applied."""
    parts = parts_of(resolved, gathered)
    findings = [
        Finding(verdict=verdict, inputs=part.inputs, reasons=_said(part, reasons, parts))
        for verdict, rule in RULES
        for part in parts
        if (part is parts[0] or rule is not under_limit) and (reasons := rule(part))
    ]
    first = first_divergence(part_of(parts, findings))
    if findings:
        return Judgement(findings[0].verdict, findings[0].reasons, first, findings)
    told = [note for part in parts for note in _said(part, notes(part), parts)]
    return Judgement(Verdict.PASS, [*told, *limit_notes(resolved)], first)


def parts_of(resolved: ResolvedCase, gathered: Gathered) -> list[Part]:
    """The parts of a case, one for each kind of inputs, exact before gaussian."""
    found = zip(inputs_of(resolved.case), (gathered, gathered.gaussian), strict=False)
    return [
        Part(msgspec.structs.replace(resolved, case=with_inputs(resolved.case, inputs)), seen)
        for inputs, seen in found
        if seen is not None
    ]


def _said(part: Part, reasons: list[Reason], parts: list[Part]) -> list[Reason]:
    """Name the inputs in findings of those that do not decide bits."""
    if part is parts[0]:
        return reasons
    return [msgspec.structs.replace(one, message=f"{part.inputs} inputs: {one.message}") for one in reasons]


def part_of(parts: list[Part], findings: list[Finding]) -> Part:
    """Part of the first finding; without findings the first part."""
    wanted = findings[0].inputs if findings else ""
    return next((part for part in parts if part.inputs == wanted), parts[0])


def first_divergence(part: Part) -> Divergence | None:
    """The first wrong stage of the first wrong arm, on the first rank where it is wrong.

    Divergences that a kernel's rounding explains come after unexplained ones, and are none where an error is outside
    its ideal, which they do not explain.
    """
    found = in_order(one for record in part.records for one in record.divergences)
    noise = found[0] if found and not any_outside(part) else None
    return next((one for one in found if not is_noise(part, one)), noise)
