"""Kinds of routing: their text, and the check that a group of ranks supports them. Makes no tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from distbench.case.trace_name import KIND, TraceName, trace_name
from distbench.errors import InvalidCase

if TYPE_CHECKING:
    from distbench.workload.trace_file import Slice

ALLOWED_ROUTINGS = "uniform, zipf:S, hot-rank:R, fan-in:R, local, duplicates, trace:FILE@STEP.LAYER"
_PLAIN_KINDS = ("uniform", "local", "duplicates")
_RANK_KINDS = ("hot-rank", "fan-in")
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
    """W ranks that share E experts evenly, and k, the experts of a token."""

    ep_size: int
    num_experts: int
    topk: int

    @property
    def experts_per_rank(self) -> int:
        """Local experts El; rank r holds [r * El, (r + 1) * El)."""
        return self.num_experts // self.ep_size


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
    if kind in _RANK_KINDS and parameter.isascii() and parameter.isdigit() and len(parameter) <= _RANK_DIGITS:
        return Routing(kind, int(parameter))
    if kind == "zipf":
        exponent = _number(parameter)
        if 0 < exponent <= _MAX_ZIPF:
            return Routing(kind, exponent)
        message = f"routing = {text!r:.80}: S must be above 0 and at most {_MAX_ZIPF:g}, for example zipf:1.2"
        raise InvalidCase(message)
    message = f"routing = {text!r:.80}: allowed are {ALLOWED_ROUTINGS}; R is a rank from 0 up, write fan-in:0"
    raise InvalidCase(message)


def check_routing(routing: Routing, group: ExpertGroup) -> None:
    """Refuse a routing that `group` cannot carry out.

    Raises:
        InvalidCase: a rank outside the group, more experts per token than the one rank of a token holds, or a recording
            of another layer.
    """
    if routing.trace is not None:
        _check_trace(routing.trace, group)
    if routing.kind in _RANK_KINDS and not routing.parameter < group.ep_size:
        message = f"routing = {routing}: with {group.ep_size} ranks, R is allowed from 0 to {group.ep_size - 1}"
        raise InvalidCase(message)
    if routing.kind in ("fan-in", "local") and group.topk > group.experts_per_rank:
        message = (
            f"routing = {routing}: needs all topk = {group.topk} experts of a token on one rank, which holds "
            f"{group.experts_per_rank}; use fewer ranks, a smaller topk or hot-rank:R"
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


@lru_cache(maxsize=4)
def recorded_slice(trace: TraceName) -> Slice:
    """The recorded experts of a step and layer, those of the file's first where none are named.

    Raises:
        InvalidCase: the file or the slice is none.
    """
    from distbench.workload.trace_file import read_header, read_slice  # noqa: PLC0415 - loads numpy

    header = read_header(trace.path)
    first = next(iter(header.steps))
    step = first if trace.step is None else trace.step
    layer = header.steps[first][0] if trace.layer is None else trace.layer
    return read_slice(header, step, layer)


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
