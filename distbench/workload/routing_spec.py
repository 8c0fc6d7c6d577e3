"""Kinds of routing: their text, and the check that a group of ranks supports them. Makes no tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from distbench.errors import InvalidCase

ALLOWED_ROUTINGS = "uniform, zipf:S, hot-rank:R, fan-in:R, local, duplicates"
_PLAIN_KINDS = ("uniform", "local", "duplicates")
_RANK_KINDS = ("hot-rank", "fan-in")
_RANK_DIGITS = 9
_MAX_ZIPF = 8.0


class Routing(msgspec.Struct, frozen=True):
    """How tokens choose experts. `parameter` is S for zipf, R for hot-rank and fan-in, else 0."""

    kind: str
    parameter: float = 0

    def __str__(self) -> str:
        """Return the text that `parse_routing` reads."""
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
    """Read `uniform`, `zipf:S` (0 < S <= 8), `hot-rank:R`, `fan-in:R`, `local` or `duplicates`.

    Raises:
        InvalidCase: an unknown kind, a missing or superfluous parameter, or one out of range.
    """
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
        InvalidCase: a rank outside the group, or more experts per token than the one rank of a token holds.
    """
    if routing.kind in _RANK_KINDS and not routing.parameter < group.ep_size:
        message = f"routing = {routing}: with {group.ep_size} ranks, R is allowed from 0 to {group.ep_size - 1}"
        raise InvalidCase(message)
    if routing.kind in ("fan-in", "local") and group.topk > group.experts_per_rank:
        message = (
            f"routing = {routing}: needs all topk = {group.topk} experts of a token on one rank, which holds "
            f"{group.experts_per_rank}; use fewer ranks, a smaller topk or hot-rank:R"
        )
        raise InvalidCase(message)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
