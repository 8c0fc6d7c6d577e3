"""The answer: what is proven, what was seen, what the chance is, and the limits to choose from."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbench.report.progress import Meter
from distbench.tools.advise.batches import Steps
from distbench.tools.advise.chance import Traffic, chance_above, fullest_law, fullest_place, smallest_limit, traffic_of
from distbench.tools.advise.kernels import Kernels, RowsKernel
from distbench.tools.advise.question import Question
from distbench.tools.advise.recording import Recording
from distbench.tools.advise.routing import Model

Rows = NDArray[np.int64]

_PERCENTILES = (0.5, 0.99, 0.999)
_FIRST_STEPS = 8


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of the fullest rank, step by step: recorded, or drawn by the model for the steps' sizes."""

    steps: int
    percentiles: dict[str, int]
    quantiles: list[int]
    """Rows that 0, 1, … 100 % of the steps do not exceed, the fewest first."""
    most: int
    step: int
    layer: int
    rank: int
    """Where the most rows were; of drawn steps, layer and rank are the likeliest ones."""
    most_tokens: int
    """Tokens of the largest step: no routing of these steps gives a rank more rows."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A limit with what is known of it. Times are microseconds of the tuned table, None without a row."""

    limit: int
    reasons: list[str]
    proven: bool
    chance_any: float
    """Bound of the chance that a step exceeds it, for any joint choice of the tokens; 1 says nothing."""
    chance_independent: float
    """The same for tokens that choose independently, by the named model."""
    seen_above: int
    """Steps of those drawn or recorded that exceed it."""
    first_steps_above: list[int]
    bucket: int
    kernel: str
    ordered: bool | None
    us: float | None
    effect: str
    layer_us: float | None = None
    """Measured time of the layer, and of its experts, microseconds of the slowest rank; None without --measure."""
    experts_us: float | None = None
    verdict: str = ""
    """Ending of the run that was measured."""


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `distbench advise` says; `recommendation` has three lines."""

    model: str
    ep_size: int
    nodes: int
    num_experts: int
    physical_experts: int
    shared_experts: int
    topk: int
    layers: int
    most_tokens: list[int]
    """Tokens that a rank has at most, of each rank."""
    capacity: int
    bound: int
    proof: list[str]
    traffic: str
    recorded: bool
    """Whether the rows of the steps were recorded, and not drawn."""
    routing_model: str
    drift: str
    """Reason why the model does not hold, empty for none."""
    target_chance: float
    chance_limit: int
    """Smallest limit that a step exceeds with at most the target chance, by the model."""
    seen: Seen
    candidates: list[Candidate]
    whole_buffer: Candidate
    recommendation: list[str]
    variable: str
    notes: list[str]
    measured: str = ""
    """What was measured, and by which clock; empty without --measure."""


class _Draws(NamedTuple):
    """Rows of the fullest rank in each step, int64 [S]."""

    rows: Rows
    steps: Steps
    kind: str = "drawn"

    def above(self, limit: int) -> tuple[int, list[int]]:
        """Steps that exceed a limit: how many, and the names of the first."""
        over = np.flatnonzero(self.rows > limit)
        return len(over), [int(self.steps.names[step]) for step in over[:_FIRST_STEPS]]


class _Doubt(NamedTuple):
    """Reason why the model does not hold, empty for none, and whether steps are drawn or recorded."""

    drift: str
    kind: str


def advise(  # noqa: PLR0913 - all that decides the answer
    question: Question,
    steps: Steps,
    model: Model,
    kernels: Kernels,
    notes: list[str],
    recording: Recording | None = None,
) -> Advice:
    """Answer a question for steps whose tokens choose by a model; rows are drawn by it, unless they were recorded."""
    batches, place = steps.batches()
    traffic = traffic_of(model.layers, batches, min(model.own + question.case.shared_experts, 1))
    draws, seen = _drawn(traffic, steps, place, question.case.seed) if recording is None else _recorded(recording)
    bound = question.prove(None).bound
    least = smallest_limit(question.chance, traffic)
    reasons = _reasons(question, kernels, bound, max(least, 1), seen)
    judged = [_candidate(limit, told, question, traffic, draws, kernels) for limit, told in reasons.items()]
    whole = _candidate(question.case.capacity, ["whole buffer"], question, traffic, draws, kernels)
    case = question.case
    return Advice(
        model=case.model,
        ep_size=case.ep_size,
        nodes=question.nodes,
        num_experts=question.placement.num_experts,
        physical_experts=len(question.placement.experts),
        shared_experts=question.case.shared_experts,
        topk=case.topk,
        layers=question.layers,
        most_tokens=list(case.tokens),
        capacity=case.capacity,
        bound=bound,
        proof=_proof(question, bound, seen),
        traffic=steps.text,
        recorded=recording is not None,
        routing_model=model.text,
        drift=model.drift,
        target_chance=question.chance,
        chance_limit=least,
        seen=seen,
        candidates=judged,
        whole_buffer=whole,
        recommendation=_recommended(question, judged, whole, _Doubt(model.drift, draws.kind), kernels),
        variable=question.variable,
        notes=[*notes, *_overflow(question, draws)],
    )


def _drawn(traffic: Traffic, steps: Steps, place: Rows, seed: int) -> tuple[_Draws, Seen]:
    rng = np.random.default_rng(seed)
    rows = np.empty(len(steps.totals), dtype=np.int64)
    with Meter("draw steps", len(traffic.batches)) as meter:
        for index, batch in enumerate(traffic.batches):
            law, mine = fullest_law(traffic, batch), np.flatnonzero(place == index)
            found = np.searchsorted(law.below, rng.random(len(mine)), side="right")
            rows[mine] = np.minimum(law.first + found, steps.totals[mine])  # a batch may be rounded up
            meter.done = index + 1
    top = int(rows.argmax())
    layer, rank = fullest_place(traffic, traffic.batches[int(place[top])], int(rows[top]))
    return _Draws(rows, steps), _seen(rows, steps, layer, rank)


def _recorded(recording: Recording) -> tuple[_Draws, Seen]:
    layer, rank = recording.places[int(recording.rows.argmax())].tolist()
    seen = _seen(recording.rows, recording.steps, layer, rank)
    return _Draws(recording.rows, recording.steps, "recorded"), seen


def _seen(rows: Rows, steps: Steps, layer: int, rank: int) -> Seen:
    top, ranked = int(rows.argmax()), np.sort(rows)
    return Seen(
        steps=len(rows),
        percentiles={f"{share:.1%}": int(ranked[math.ceil(share * len(rows)) - 1]) for share in _PERCENTILES},
        quantiles=[int(ranked[max(math.ceil(share * len(rows) / 100) - 1, 0)]) for share in range(101)],
        most=int(rows[top]),
        step=int(steps.names[top]),
        layer=layer,
        rank=rank,
        most_tokens=int(steps.totals.max()),
    )


def _overflow(question: Question, draws: _Draws) -> list[str]:
    count, first = draws.above(question.case.capacity)
    if not count:
        return []
    steps = ", ".join(map(str, first))
    told = f"{count} {draws.kind} steps exceed the receive buffer, the first are {steps}"
    return [f"OVERFLOW, whatever the limit: {told}"]


def _reasons(question: Question, kernels: Kernels, bound: int, least: int, seen: Seen) -> dict[int, list[str]]:
    """Limits to judge, smallest first, with why each is there."""
    found: dict[int, list[str]] = {}
    for edge in kernels.edges(min(least, bound), min(kernels.edge(bound), question.case.capacity)):
        found.setdefault(edge, []).append("bucket edge")
    found.setdefault(max(bound, 1), []).insert(0, "smallest proven")
    if least <= bound:
        found.setdefault(least, []).insert(0, f"chance {question.chance:.0e}")
    found.setdefault(min(max(seen.most, 1), question.case.capacity), []).append("fullest seen")
    if question.limit is not None:
        found.setdefault(question.limit, []).insert(0, "yours")
    return dict(sorted(found.items()))


def _candidate(  # noqa: PLR0913 - the columns of a table
    limit: int, reasons: list[str], question: Question, traffic: Traffic, draws: _Draws, kernels: Kernels
) -> Candidate:
    proven = question.prove(limit).status == "proven"
    chance = chance_above(limit, traffic)
    count, first = draws.above(limit)
    kernel: RowsKernel = kernels.of(limit)
    return Candidate(
        limit=limit,
        reasons=reasons,
        proven=proven,
        chance_any=chance.any_joint,
        chance_independent=chance.independent,
        seen_above=count,
        first_steps_above=first,
        bucket=kernel.bucket,
        kernel=kernel.label,
        ordered=kernel.ordered,
        us=kernel.us,
        effect=kernel.effect,
    )


def _proof(question: Question, bound: int, seen: Seen) -> list[str]:
    """The bound, in steps that can be checked by hand."""
    case, total = question.case, sum(question.case.tokens)
    equal = len(set(case.tokens)) == 1
    formula = f"{case.ep_size} ranks x {case.tokens[0]} tokens = {total}" if equal else question.prove(None).formula
    fits = "suffices." if total <= case.capacity else "may not: OVERFLOW, whatever the limit."
    one = f"A token sends a rank at most one row, however many of its {case.topk} experts are there"
    lines = [
        f"{one}. So a rank receives at most as many rows as all ranks have tokens: {formula}.",
        f"It can: where each token has one expert on rank 0, that rank receives {total} rows (routing hot-rank:0).",
        f"A sender has at most M = {case.max_dispatch_tokens_per_rank} tokens: a buffer of {case.capacity} rows {fits}",
    ]
    if seen.most_tokens < bound:
        lines.append(f"For these steps alone {seen.most_tokens} rows are enough: the largest has as many tokens.")
    return lines


def _recommended(
    question: Question, judged: list[Candidate], whole: Candidate, doubt: _Doubt, kernels: Kernels
) -> list[str]:
    """Three lines: the proven limit, the asked one, and the smallest by chance."""
    proven = next(one for one in judged if one.proven)
    whole_buffer = proven.limit >= question.case.capacity
    total, capacity = sum(question.case.tokens), question.case.capacity
    first = (
        f"OVERFLOW, whatever the limit: a rank may receive {total} rows, the receive buffer holds {capacity}; "
        f"give fewer tokens, or a buffer of {total} rows."
        if total > capacity
        else f"{question.variable}=0 (off): the smallest proven limit, {proven.limit}, is the whole receive buffer."
        if whole_buffer
        else f"{question.variable}={proven.limit} is proven: no routing gives a rank more rows. {_gain(proven, whole)}."
    )
    asked = next((one for one in judged if "yours" in one.reasons), None)
    by_chance = [one for one in judged if one.chance_independent <= question.chance and not one.proven]
    smaller = next((one for one in by_chance if one.limit == kernels.edge(one.limit) < proven.limit), None)
    return [first, _about_asked(asked, proven, whole, doubt), _about_smaller(smaller, question, proven, doubt)]


def _about_asked(asked: Candidate | None, proven: Candidate, whole: Candidate, doubt: _Doubt) -> str:
    if asked is None:
        return "No limit was given to judge; --limit ROWS judges yours."
    if asked.limit >= whole.limit:
        return f"Yours cuts nothing: it is off, or at least the {whole.limit} rows of the receive buffer."
    if asked.proven:
        return f"Yours, {asked.limit}, is proven. {_gain(asked, whole)}."
    gain = f"{proven.limit} has the same bucket" if asked.bucket == proven.bucket else _gain(asked, whole)
    return f"Yours, {asked.limit}, is NOT PROVEN: {_risk(asked, doubt)}. {gain[0].upper()}{gain[1:]}."


def _about_smaller(smaller: Candidate | None, question: Question, proven: Candidate, doubt: _Doubt) -> str:
    if doubt.drift:
        return f"No smaller limit by chance: the model does not hold, {doubt.drift}."
    if smaller is None:
        return (
            f"No smaller limit pays: with a chance of {question.chance:.0e} a step needs the bucket of the proven "
            f"{proven.limit}."
        )
    gain = _gain(smaller, proven)
    if smaller.effect != "unknown" and (smaller.kernel, smaller.us) == (proven.kernel, proven.us):
        gain = f"It gains nothing: the kernel is that of {proven.limit} rows"
    return f"Smaller, {smaller.limit}, is NOT PROVEN: {_risk(smaller, doubt)}. {gain}."


def _risk(one: Candidate, doubt: _Doubt) -> str:
    if one.chance_independent == 0:
        return "no step of this traffic can exceed it, but other steps within the tokens can"
    steps = {0: f"no {doubt.kind} step exceeds it", 1: f"one {doubt.kind} step exceeds it"}
    seen = steps.get(one.seen_above, f"{one.seen_above} {doubt.kind} steps exceed it")
    if doubt.drift:
        return f"{seen}, and the model of its chance does not hold ({doubt.drift})"
    return f"{seen}; a step does with a chance of {told_chance(one.chance_independent)} if tokens choose independently"


def told_chance(chance: float) -> str:
    """A chance as text: an upper bound with one digit."""
    return "0" if chance == 0 else "1" if chance >= 1 else "below 1e-300" if chance < 1e-300 else f"{chance:.1e}"  # noqa: PLR2004


def _gain(one: Candidate, other: Candidate) -> str:
    """Change of the kernel from another limit to this one."""
    against = f"{other.limit} rows"
    if one.us is not None and other.us is not None and one.bucket != other.bucket:
        return f"Tuned time {one.us:.1f} us, {other.us:.1f} us with {against}"
    if "unknown" in (one.effect, other.effect):
        return "The kernel is unknown: no tuned row"
    if one.kernel == other.kernel:
        return f"The kernel is that of {against}"
    sums = "" if one.ordered == other.ordered else f", {_sum(one)} instead of {_sum(other)} sums"
    return f"Another kernel than with {against}{sums}: {one.kernel}"


def _sum(one: Candidate) -> str:
    return "ordered" if one.ordered else "atomic"
