"""Kinds of routing: their text, and the check that a group of ranks supports them. Makes no tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from distbench.case.placement import experts_in_slots
from distbench.case.trace_name import KIND, TraceName, trace_name
from distbench.errors import InvalidCase

if TYPE_CHECKING:
    from distbench.case.spec import Case
    from distbench.workload.trace_file import Header, Slice
    from distbench.workload.trace_tensors import Tensors

ALLOWED_ROUTINGS = "uniform, zipf:S, hot-rank:R, fan-in:R, local, duplicates, trace:FILE@STEP.LAYER"
_PLAIN_KINDS = ("uniform", "local", "duplicates")
RANK_KINDS = ("hot-rank", "fan-in")
"""Kinds that name a rank."""
_UNREPLICATED = ("local", "duplicates")
_ONE_RANK = ("fan-in", "local")
_RANK_DIGITS = 9
_MAX_ZIPF = 8.0
_SHOWN_RANKS = 16


class Routing(msgspec.Struct, frozen=True):
    """How tokens choose experts. `parameter` is S for zipf, R for hot-rank and fan-in, else 0; `trace` a recording."""

    kind: str
    parameter: float = 0
    trace: TraceName | None = None

    def __str__(self) -> str:
        """Return the text that `parse_routing` reads."""
        if self.trace is not None:
            return str(self.trace)
        if self.kind in _PLAIN_KINDS:
            return self.kind
        short = f"{self.parameter:g}"
        return f"{self.kind}:{short if float(short) == self.parameter else repr(self.parameter)}"


class ExpertGroup(NamedTuple):
    """W ranks that share E experts evenly, and k, the experts of a token; E and k may count slots (`Slots.placed`)."""

    ep_size: int
    num_experts: int
    topk: int

    @property
    def experts_per_rank(self) -> int:
        """Local experts El; rank r holds [r * El, (r + 1) * El)."""
        return self.num_experts // self.ep_size


class Slots(NamedTuple):
    """The slots of a token's k routed experts: on ranks, shared slots behind them, and ids of -1.

    `group` has the routed experts and k. `experts` has the expert in each slot of routed experts, the same number of
    slots on each rank; empty where slot p holds expert p. Each rank holds `shared` experts more. Shares are of 1.
    """

    group: ExpertGroup
    experts: tuple[int, ...] = ()
    shared: int = 0
    replica_choice: str = "dynamic"
    dropped_slots: float = 0.0
    dropped_tokens: float = 0.0

    @property
    def routed_per_rank(self) -> int:
        """Slots of routed experts on a rank."""
        return (len(self.experts) or self.group.num_experts) // self.group.ep_size

    @property
    def placed(self) -> ExpertGroup:
        """The ranks with all their slots as experts, and all slots of a token: what dispatch and combine see."""
        ranks = self.group.ep_size
        return ExpertGroup(ranks, (self.routed_per_rank + self.shared) * ranks, self.group.topk + self.shared)

    @property
    def logical(self) -> int:
        """Number of experts with weights of their own: routed ones, then shared ones."""
        return self.group.num_experts + self.shared

    def held(self, rank: int) -> list[int]:
        """Routed experts with a slot on `rank`, ascending."""
        here = range(rank * self.routed_per_rank, (rank + 1) * self.routed_per_rank)
        return sorted({self.experts[slot] for slot in here}) if self.experts else list(here)


def slots_of(case: Case) -> Slots:
    """Slots of a case's tokens."""
    replicated = case.physical_experts or case.placement
    return Slots(
        ExpertGroup(case.ep_size, case.num_experts, case.topk),
        experts_in_slots(case.num_experts, case.physical_experts, case.placement) if replicated else (),
        case.shared_experts,
        case.replica_choice,
        case.dropped_slots,
        case.dropped_tokens,
    )


def parse_routing(text: str) -> Routing:
    """Read `uniform`, `zipf:S` (0 < S <= 8), `hot-rank:R`, `fan-in:R`, `local`, `duplicates` or `trace:FILE`.

    Raises:
        InvalidCase: an unknown kind, a missing or superfluous parameter, or one out of range.
    """
    named = trace_name(text)
    if named:
        return Routing(KIND, trace=named)
    kind, colon, parameter = text.strip().partition(":")
    if kind in _PLAIN_KINDS and not colon:
        return Routing(kind)
    if kind in RANK_KINDS and parameter.isascii() and parameter.isdigit() and len(parameter) <= _RANK_DIGITS:
        return Routing(kind, int(parameter))
    if kind == "zipf":
        exponent = _number(parameter)
        if 0 < exponent <= _MAX_ZIPF:
            return Routing(kind, exponent)
        message = f"routing = {text!r:.80}: S must be above 0 and at most {_MAX_ZIPF:g}, for example zipf:1.2"
        raise InvalidCase(message)
    message = f"routing = {text!r:.80}: allowed are {ALLOWED_ROUTINGS}; R is a rank from 0 up, write fan-in:0"
    raise InvalidCase(message)


def check_routing(routing: Routing, group: ExpertGroup, slots: Slots | None = None) -> None:
    """Refuse a routing that `group` cannot carry out, or that `slots` of replicas, if there are any, leave undefined.

    Raises:
        InvalidCase: a rank outside the group, more experts per token than the one rank of a token holds, or a recording
            of another layer.
    """
    if routing.trace is not None:
        _check_trace(routing.trace, group)
    if routing.kind in RANK_KINDS and not routing.parameter < group.ep_size:
        message = f"routing = {routing}: with {group.ep_size} ranks, R is allowed from 0 to {group.ep_size - 1}"
        raise InvalidCase(message)
    if slots is not None and slots.experts and routing.kind in _UNREPLICATED:
        message = f"routing = {routing}: not with replicated experts; use hot-rank:R, fan-in:R, or one by experts"
        raise InvalidCase(message)
    if routing.kind not in _ONE_RANK:
        return
    on_one = len(slots.held(int(routing.parameter))) if slots is not None and slots.experts else group.experts_per_rank
    if group.topk > on_one:
        message = (
            f"routing = {routing}: needs all topk = {group.topk} experts of a token on one rank, which holds "
            f"{on_one}; use fewer ranks, a smaller topk or hot-rank:R"
        )
        raise InvalidCase(message)


def check_recorded_tokens(routing: Routing, tokens: Sequence[int]) -> None:
    """Refuse more tokens of a rank than its recording has.

    Raises:
        InvalidCase: names the rank, its tokens and those recorded.
    """
    if routing.trace is None:
        return
    recorded = recorded_slice(routing.trace).tokens.tolist()
    for rank, (count, most) in enumerate(zip(tokens, recorded, strict=True)):
        if count > most:
            told = ",".join(map(str, recorded[:_SHOWN_RANKS])) + ("" if len(recorded) <= _SHOWN_RANKS else ",…")
            message = f"tokens: rank {rank} has {count}, the recording {most}; give --tokens {told}, or fewer"
            raise InvalidCase(message)


def recorded_notes(case: Case) -> list[str]:
    """Say that gaussian inputs are recorded hidden states, if they are; empty where they are generated.

    Raises:
        InvalidCase: the file or the slice is none, or its hidden states are not of the format.
    """
    tensors = _tensors_of(case)
    note = "gaussian inputs are recorded tokens with generated experts"
    told = f"{note}: {tensors.kind} hidden states of {case.routing}; bounds of errors are wider" if tensors else ""
    return [f"{told} (docs/gaussian.md)"] if tensors else []


def _tensors_of(case: Case) -> Tensors | None:
    trace = parse_routing(case.routing).trace
    return None if trace is None or case.numerics == "exact" else recorded_tensors(trace)


def check_recorded_tensors(case: Case) -> None:
    """Refuse recorded hidden states of another layer, where gaussian inputs take them.

    Raises:
        InvalidCase: they were recorded with another hidden size or fp8 format, or are no hidden states of a layer.
    """
    tensors = _tensors_of(case)
    wrong = "" if tensors is None else _misfit(case, tensors)
    if wrong:
        message = (
            f"routing = {case.routing}: {wrong}; give what was recorded, or --numerics exact, whose hidden states "
            "are generated, or a trace without hidden states (`distbench trace convert --no-tensors`)"
        )
        raise InvalidCase(message)


def _misfit(case: Case, tensors: Tensors) -> str:
    live = case.hidden_size - case.hidden_pad
    if tensors.hidden_size != live:
        return f"hidden_size = {live}, recorded hidden states have {tensors.hidden_size}"
    if case.combine_quant != "none":
        return f"combine_quant = {case.combine_quant}, whose errors have bounds for generated hidden states alone"
    if tensors.kind == "bf16":
        return ""
    if case.dispatch_dtype != "fp8" or case.fp8_format != tensors.kind:
        given = case.fp8_format if case.dispatch_dtype == "fp8" else case.dispatch_dtype
        return f"dispatch of {given}, recorded hidden states are fp8 of format {tensors.kind}"
    return "hidden_pad with recorded fp8" if case.hidden_pad else ""


@lru_cache(maxsize=4)
def recorded_slice(trace: TraceName) -> Slice:
    """The recorded experts of a step and layer, those of the file's first where none are named.

    Raises:
        InvalidCase: the file or the slice is none.
    """
    from distbench.workload.trace_file import read_header, read_slice  # noqa: PLC0415 - loads numpy

    header = read_header(trace.path)
    return read_slice(header, *_place(header, trace))


@lru_cache(maxsize=4)
def recorded_tensors(trace: TraceName) -> Tensors | None:
    """The recorded hidden states of a step and layer, as `recorded_slice` has its experts; None where there are none.

    Raises:
        InvalidCase: the file or the slice is none, or its hidden states are not of the format.
    """
    from distbench.workload.trace_file import read_header, read_tensors  # noqa: PLC0415 - loads numpy

    header = read_header(trace.path)
    return read_tensors(header, *_place(header, trace), len(recorded_slice(trace).ids))


def _place(header: Header, trace: TraceName) -> tuple[int, int]:
    first = next(iter(header.steps))
    step = first if trace.step is None else trace.step
    return step, header.steps[first][0] if trace.layer is None else trace.layer


def _check_trace(trace: TraceName, group: ExpertGroup) -> None:
    from distbench.workload.trace_file import read_header  # noqa: PLC0415 - loads numpy

    header = read_header(trace.path)
    recorded = {"ep_size": header.ep_size, "num_experts": header.num_experts, "topk": header.topk}
    other = [
        f"{key} = {value}, not {getattr(group, key)}" for key, value in recorded.items() if value != getattr(group, key)
    ]
    if other:
        message = f"routing = {trace}: recorded with {', '.join(other)}; give the layer and ranks of the recording"
        raise InvalidCase(message)
    recorded_slice(trace)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
