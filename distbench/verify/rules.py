"""The rules of the verdict, one function each: reasons for it, or none (docs/verdicts.md)."""

from __future__ import annotations

from collections.abc import Iterable

from distbench.case.stages import Arm
from distbench.errors import Verdict
from distbench.utils.text import counted
from distbench.verify.excuses import (
    OTHERS,
    Part,
    adds_atomically,
    again,
    bounds_met,
    excuse,
    far_ranks,
    is_close,
    is_noise,
    shows_other_bits,
    tolerance,
)
from distbench.verify.records import NOT_PROVEN, ORACLE, ArmError, Divergence, Gathered, Reason, ResolvedCase


def baseline_wrong(part: Part) -> list[Reason]:
    """Faults of the padded arm: proven, a NaN, or outside its ideal."""
    reasons = [_diverged(part, found) for found in part.divergences(Arm.PADDED)]
    oracle = f"padded/{ORACLE}"
    if not reasons and oracle in part.gathered.comparisons and not part.gathered.comparisons[oracle].equal:
        reasons = [_differs(part.gathered, oracle)]
    return [*reasons, *_nan(part, Arm.PADDED), *_outside(part, Arm.PADDED), *_far_from_reference(part)]


def corrupt(part: Part) -> list[Reason]:
    """Faults of another arm, in tokens that lost no row to the limit.

    Where the padded arm is wrong, bits that differ from its bits mean nothing.
    """
    baseline = not baseline_wrong(part)
    found = [one for one in part.divergences(*OTHERS) if one.proven or (baseline and not is_noise(part, one))]
    reasons = [_diverged(part, one) for one in sorted(found, key=lambda one: not one.proven)]
    for arm in OTHERS:
        reasons += [*_nan(part, arm), *_outside(part, arm), *(_far(part, arm) if baseline else ())]
    reasons += [once.reason for once in again(part) if not once.rounding]
    reasons += [_differs(part.gathered, pair) for pair in _unexplained_pairs(part, baseline=baseline)]
    reasons += [
        Reason(code="disputed", rank=rank, message=f"rank {rank} and rank 0 disagree on which of its tokens differ")
        for rank in part.gathered.disputed
    ]
    return reasons


def under_limit(part: Part) -> list[Reason]:
    """Ranks that receive more rows than the limit keeps, and the damage."""
    resolved = part.resolved
    if resolved.case.policy == "guard" or not resolved.short_ranks:
        return []
    recv = resolved.per_call.total_recv
    where = " in a sub-batch" if resolved.sub_batches else ""
    consequence = "refused on all ranks" if resolved.refused else "cut all the same"
    advice = (
        f"a limit of {resolved.proof.bound} is proven for any routing of these token counts, "
        f"{resolved.per_call.max_recv} is enough for this batch only"
    )
    reasons = [
        Reason(
            code="limit-below-total-recv",
            rank=rank,
            message=f"rank {rank} receives {counted(recv[rank], 'row')}{where}, the limit keeps {resolved.limit}: "
            f"{recv[rank] - (resolved.limit or 0)} lost, {consequence}; {advice}",
        )
        for rank in resolved.short_ranks
    ]
    if not resolved.refused:
        damaged = part.gathered.comparisons["padded/truncated"]
        message = f"truncated differs from padded in {counted(damaged.differing_tokens, 'token')}"
        reasons.append(Reason(code="damage", message=message))
    return reasons


def nondeterministic(part: Part) -> list[Reason]:
    """The first sign that the padded arm's kernel does not repeat its bits, where bits are required.

    `require = tolerance` requires none of a kernel that adds atomically; any other kernel must repeat them.
    """
    if part.resolved.case.require == "tolerance" and adds_atomically(part.kernels[Arm.PADDED]):
        return []
    return _unrepeated(part)[:1]


def drift(part: Part) -> list[Reason]:
    """Differences between another kernel's bits and padded's, where bits are required."""
    return [] if part.resolved.case.require == "tolerance" else _drifted(part)


def notes(part: Part) -> list[Reason]:
    """Notes of a PASS on explained differences of bits."""
    return [*_unrepeated(part)[:1], *_drifted(part), *_replayed(part)]


def _replayed(part: Part) -> list[Reason]:
    """Replays of each arm's layer in a graph; times are those of the slowest rank."""
    found = []
    for graphs in zip(*(record.layer_graphs for record in part.records), strict=True):
        first, replays = graphs[0], sum(len(one.replays) for one in graphs)
        skipped = f", {first.skipped} not made for lack of room" if first.skipped else ""
        host, device = max(one.host_us for one in graphs), max(one.device_us for one in graphs)
        message = (
            f"{first.arm}: its layer in one graph gave the right tokens in {counted(replays, 'replay')}{skipped}; one "
            f"takes {host:.1f} µs of the host and {device:.1f} µs of the device"
        )
        found.append(Reason(code="layer-graph", message=message))
    return found


def limit_notes(resolved: ResolvedCase) -> list[Reason]:
    """Notes of a PASS on the limit."""
    found = []
    if resolved.short_ranks:
        ranks = ", ".join(str(rank) for rank in resolved.short_ranks)
        message = f"policy guard raised the limit of {resolved.limit} on rank {ranks}"
        found.append(Reason(code="guarded", message=message))
    if resolved.proof.status == "this batch" and resolved.case.policy != "guard":
        message = (
            f"not proven for other routings: the limit keeps {resolved.limit}, a rank receives up to "
            f"{resolved.proof.bound} rows under another routing of these token counts ({resolved.proof.formula})"
        )
        found.append(Reason(code=NOT_PROVEN, message=message))
    return found


RULES = (
    (Verdict.BASELINE_WRONG, baseline_wrong),
    (Verdict.CORRUPT, corrupt),
    (Verdict.UNDER_LIMIT, under_limit),
    (Verdict.NONDETERMINISTIC, nondeterministic),
    (Verdict.DRIFT, drift),
)
"""The most fundamental first."""


def _unexplained_pairs(part: Part, *, baseline: bool) -> list[str]:
    """Comparisons of other arms with differing tokens that lost no row and that no kernel explains."""
    if not (baseline or part.exact):  # distances are from a wrong padded arm
        return []
    found = []
    for pair in part.gathered.comparisons:
        first, second = pair.split("/")
        said = first == Arm.PRODUCTION or (second != ORACLE and (baseline or first != Arm.PADDED))
        other = [arm for arm in (first, second) if shows_other_bits(part, arm)]
        explained = other and all(excuse(part, arm) for arm in other)
        if said and part.differing(pair) and not explained:
            found.append(pair)
    return found


def _nan(part: Part, arm: str) -> Iterable[Reason]:
    for record in part.records:
        tokens = part.nan_tokens(record, arm)
        if tokens:
            found = f"NaN in {counted(tokens, 'token')} of {part.gathered.arm_name(arm)}"
            message = f"rank {record.rank}: {found}; no input holds one"
            yield Reason(code="nan", rank=record.rank, message=message)


def _outside(part: Part, arm: str) -> Iterable[Reason]:
    for record in part.records:
        for error in record.errors:
            if error.arm == arm and not error.within:
                message = f"rank {record.rank}: {error_text(error, part.gathered.arm_name(arm))}"
                yield Reason(code="error", rank=record.rank, message=message, stage=error.stage)


def error_text(error: ArmError, arm: str) -> str:
    """Name the figures outside their bounds; `arm` is the arm's name in messages."""
    start = f"{arm} at {error.stage}, {counted(error.rows, 'row')} against ideal roundings ({error.family}): "
    if error.nan_rows:
        return f"{start}{counted(error.nan_rows, 'row')} hold a NaN or an infinity"
    low, high = (error.allowed.get(key, 0.0) for key in ("ratio_low", "ratio_high"))
    bias, worst = (error.allowed.get(key, 0.0) for key in ("bias", "worst"))
    return (
        f"{start}error {_figure(error.ratio)} of ideal, allowed {low:.3g} to {high:.3g}; bias {_figure(error.bias)}, "
        f"allowed {bias:.3g}; worst {_figure(error.worst)}, allowed {worst:.3g}"
    )


def _far_from_reference(part: Part) -> Iterable[Reason]:
    """Padded against a float reference of a few tokens, where no error was measured."""
    allowed = tolerance(part.resolved.case)
    for record in part.records:
        measured = any(error.arm == Arm.PADDED for error in record.errors)
        if record.reference is not None and not measured and not is_close(record.reference.worst, allowed):
            message = (
                f"rank {record.rank}: padded is {_figure(record.reference.worst)} of a token's largest magnitude "
                f"away from the float reference, allowed is {allowed:.3g}"
            )
            yield Reason(code="reference", rank=record.rank, message=message)


def _far(part: Part, arm: str) -> Iterable[Reason]:
    """Where rounding explains no difference between an arm and padded: in gaussian inputs, beyond the tolerance.

    Where errors were measured, those outside their bounds say so.
    """
    if part.exact or part.measured:
        return
    allowed = tolerance(part.resolved.case)
    for record in far_ranks(part, arm):
        if not part.nan_tokens(record, arm):
            message = (
                f"rank {record.rank}: {part.gathered.arm_name(arm)} is {_figure(record.distance_of(arm))} of a token's "
                f"largest magnitude away from padded, allowed is {allowed:.3g}"
            )
            yield Reason(code="far", rank=record.rank, message=message)


def _unrepeated(part: Part) -> list[Reason]:
    """Signs that the padded arm's kernel does not repeat its bits."""
    if part.exact:
        return []
    label = part.kernels[Arm.PADDED]["label"]
    reasons = [
        Reason(
            code=f"{arm}-differs",
            message=f"{part.gathered.arm_name(arm)} differs from padded in {counted(part.rows(arm), 'expert row')} and "
            f"in {_extent(part.gathered, f'padded/{arm}')}: the same kernel ({label}) gave other bits, so bits "
            "cannot be asked of it",
        )
        for arm in OTHERS
        if shows_other_bits(part, arm) and excuse(part, arm) == "order"
    ]
    return reasons + [once.reason for once in again(part) if once.rounding and not once.other]


def _drifted(part: Part) -> list[Reason]:
    """Differences of cut arms from padded due to their kernel, in tokens or only in expert rows, and in second runs."""
    repeated = [once.reason for once in again(part) if once.rounding and once.other]
    arms = [arm for arm in (Arm.TRUNCATED, Arm.PRODUCTION) if shows_other_bits(part, arm)]
    found = [_of_another_kernel(part, arm) for arm in arms if excuse(part, arm) == "kernel"]
    return [*found[:1], *repeated]


def _of_another_kernel(part: Part, arm: Arm) -> Reason:
    kernels = part.kernels
    whose = "" if arm == Arm.TRUNCATED else f"{part.gathered.arm_name(arm)}: "
    message = (
        f"{whose}no row lost, another kernel ({kernels['padded']['label']} → {kernels[arm]['label']}), other bits in "
        f"{counted(part.rows(arm), 'expert row')} and in {_extent(part.gathered, f'padded/{arm}')}, {bounds_met(part)}"
    )
    return Reason(code="kernel-drift", message=message)


def _diverged(part: Part, found: Divergence) -> Reason:
    message = found.line(part.gathered.arm_name(found.arm))
    return Reason(code=f"{found.stage}-differs", rank=found.rank, message=message, stage=found.stage)


def _differs(gathered: Gathered, pair: str) -> Reason:
    first, second = pair.split("/")
    listed = gathered.differing[pair]
    rank = listed[0][0] if listed else None
    start = f", first token {listed[0][1]} of rank {rank}" if listed else ""
    names = gathered.arm_name(first), gathered.arm_name(second)
    message = f"{names[1]} differs from {names[0]} in {_extent(gathered, pair)}{start}"
    return Reason(code="bits-differ", rank=rank, message=message)


def _figure(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.3g}"


def _extent(gathered: Gathered, pair: str) -> str:
    found = gathered.comparisons[pair]
    elements = counted(found.differing_elements, "element")
    return f"{counted(found.differing_tokens, 'token')} ({elements}, at most {found.max_ulp} ulp)"
