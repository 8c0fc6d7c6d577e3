"""Advice as text: the proof, what was seen, the table of limits, and three lines of recommendation."""

from __future__ import annotations

from distbench.report.terminal import Grid, print_parts
from distbench.tools.advise.advice import Advice, Candidate, told_chance
from distbench.utils.text import counted
from distbench.utils.voice import Voice, voice

_COLUMNS = ("limit", "why", "proven", "chance", "any choice", "seen above", "bucket", "kernel", "us", "kernel change")
_MEASURED = ("layer us", "verdict")


def print_advice(advice: Advice) -> None:
    """Print an advice; with --quiet the recommendation alone."""
    lines = advice.recommendation
    if voice() is Voice.QUIET:
        print_parts(lines)
        return
    table = Grid(columns_of(advice), [cells_of(one, advice) for one in (*advice.candidates, advice.whole_buffer)])
    proof = ["Proof:", *_numbered(advice.proof), ""]
    print_parts([head_of(advice), "", *proof, *traffic_of(advice), table, *about_of(advice)])
    print_parts(["", *lines])


def columns_of(advice: Advice) -> tuple[str, ...]:
    """Heads of the table of limits."""
    return _COLUMNS if not advice.measured else (*_COLUMNS, *_MEASURED)


def head_of(advice: Advice) -> str:
    """The layer, its ranks, tokens and buffer."""
    slots = advice.physical_experts // advice.ep_size
    held = (
        f"{slots} a rank"
        if advice.physical_experts == advice.num_experts
        else (f"in {counted(advice.physical_experts, 'slot')}, {slots} a rank")
    )
    shared = f" and {advice.shared_experts} shared" if advice.shared_experts else ""
    nodes = f", {counted(advice.nodes, 'node')}" if advice.nodes else ""
    layers = f"{advice.layers} MoE {'layer' if advice.layers == 1 else 'layers'}"
    experts = f"{counted(advice.num_experts, 'expert')}, {held}{shared}, top-{advice.topk}, {layers}"
    buffer = counted(advice.capacity, "row")
    batch = f"at most {_tokens(advice.most_tokens)} tokens in a step; receive buffer {buffer}"
    return f"{advice.model} on {counted(advice.ep_size, 'rank')}{nodes}: {experts}; {batch}"


def _tokens(tokens: list[int]) -> str:
    if len(set(tokens)) == 1:
        return f"{len(tokens)} x {tokens[0]} = {sum(tokens)}"
    return f"{sum(tokens)} ({min(tokens)} to {max(tokens)} a rank)"


def _numbered(lines: list[str]) -> list[str]:
    return [f"  {number}. {line}" for number, line in enumerate(lines, 1)]


def traffic_of(advice: Advice) -> list[str]:
    """The steps, their model, and what was seen of them."""
    seen = advice.seen
    shares = ", ".join(f"{share} {rows}" for share, rows in seen.percentiles.items())
    likeliest = "" if advice.recorded else "likeliest "
    most = f"most {seen.most}, in step {seen.step}, {likeliest}on rank {seen.rank} in layer {seen.layer}"
    rows = "The model of chances" if advice.recorded else "Rows are drawn by the model"
    lines = [
        f"Traffic: {advice.traffic}. {rows}: {advice.routing_model}, each token on its own.",
        f"Seen: rows of the fullest rank in a step: {shares}; {most}.",
    ]
    if advice.drift:
        lines.append(f"THE MODEL DOES NOT HOLD: {advice.drift}; its chances below say nothing.")
    return lines


def cells_of(one: Candidate, advice: Advice) -> tuple[str, ...]:
    """A limit as a row of the table."""
    told = "no model" if advice.drift and not one.proven else told_chance(one.chance_independent)
    sums = "" if one.ordered is None else ", ordered" if one.ordered else ""
    return (
        str(one.limit),
        ", ".join(one.reasons),
        "yes" if one.proven else "NO",
        told,
        told_chance(one.chance_any),
        str(one.seen_above),
        str(one.bucket),
        f"{one.kernel}{sums}",
        "" if one.us is None else f"{one.us:.1f}",
        one.effect,
        *([] if not advice.measured else ["-" if one.layer_us is None else f"{one.layer_us:.1f}", one.verdict]),
    )


def about_of(advice: Advice) -> list[str]:
    """Notes to the table."""
    says = any(one.chance_any < 1 for one in advice.candidates if not one.proven)
    trivial = "" if says else "; it is trivial here"
    lines = [
        "chance: of a step, over all ranks and layers, if tokens choose independently by the model.",
        f"any choice: bound for any joint choice in which a token chooses each rank as often{trivial}.",
        "kernel change: against the whole buffer.",
    ]
    return [*lines, *filter(None, [advice.measured]), *advice.notes]
