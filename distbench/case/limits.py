"""The limit: the number of rows of the receive buffer that reach the experts, as requested and as resolved.

`SGLANG_MORI_MOE_MAX_INPUT_TOKENS` is a number of rows, 0 meaning off. A case may also name a formula instead of a
number, so that one case file serves any routing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from distbench.errors import InvalidCase, Overflow
from distbench.utils.text import counted, shown

DERIVED_LIMITS = ("max-recv", "sum", "sum32", "pow2", "capacity")
ALLOWED_LIMITS = (
    "off, a whole number of rows from 1 up, max-recv, max-recv+N, max-recv-N, sum, sum32, pow2, capacity or capacity+N"
)

_MAX_DIGITS = 12
_OFFSET = re.compile(rf"(max-recv[+-]|capacity\+)(\d{{1,{_MAX_DIGITS}}})", re.ASCII)

RECV_BOUND_STEP = 32
_SHOWN_RANKS = 8
_MOST_TERMS = 16

Proof = Literal["proven", "this batch", "unsafe"]


class Traffic(msgspec.Struct, frozen=True):
    """Row counts of a case's routing, known before any payload moves.

    `tokens[r]` is the batch of rank r, `total_recv[r]` the rows rank r receives, `capacity` is R, the rows of the
    receive buffer.
    """

    tokens: tuple[int, ...]
    total_recv: tuple[int, ...]
    capacity: int

    @property
    def max_recv(self) -> int:
        """Rows received by the fullest rank."""
        return max(self.total_recv)


def parse_limit(value: str | int) -> str:
    """Canonical text of a limit: `off`, digits, or one of `DERIVED_LIMITS`, some with `+N` or `-N`.

    Raises:
        InvalidCase: any other text. A negative number is refused because production reads it as off.

    """
    text = value.strip() if isinstance(value, str) else shown(value)
    offset = _OFFSET.fullmatch(text)
    if offset:
        rows = int(offset[2])
        return f"{offset[1]}{rows}" if rows else offset[1][:-1]
    if text in (*DERIVED_LIMITS, "off"):
        return text
    if _is_digits(text):
        return str(int(text)) if int(text) else "off"
    if text.startswith("-") and _is_digits(text[1:]):
        message = f"limit = {text}: production takes a negative limit as off and cuts nothing; use off or at least 1"
        raise InvalidCase(message)
    message = f"limit = {shown(value)}: allowed are {ALLOWED_LIMITS} (N and rows have up to {_MAX_DIGITS} digits)"
    raise InvalidCase(message)


def resolve_limit(limit: str, traffic: Traffic) -> int | None:
    """Number of rows to cut to, or None where the limit is off.

    `sum` is the provable bound (one row per token and destination rank); `sum32` rounds it up to 32, at least 32 and
    at most R; `pow2` rounds it up to a power of two. `capacity` is R.

    Raises:
        InvalidCase: a derived limit comes out below one row, which production would read as off.

    """
    if limit == "off":
        return None
    if limit.isdigit():
        return int(limit)
    offset = _OFFSET.fullmatch(limit)
    base, extra = (offset[1][:-1], int(offset[1][-1] + offset[2])) if offset else (limit, 0)
    total = sum(traffic.tokens)
    rows = (
        extra
        + {
            "max-recv": traffic.max_recv,
            "sum": total,
            "sum32": min(round_up(max(total, 1), RECV_BOUND_STEP), traffic.capacity),
            "pow2": 1 << max(total - 1, 0).bit_length(),
            "capacity": traffic.capacity,
        }[base]
    )
    if rows < 1:
        message = (
            f"limit = {limit}: comes out as {counted(rows, 'row')} (the fullest rank receives {traffic.max_recv}), "
            "which production reads as off; use off or give a rank more tokens"
        )
        raise InvalidCase(message)
    return rows


class LimitProof(msgspec.Struct, frozen=True, kw_only=True):
    """Traffic for which a limit loses no row.

    `status`: "proven" under any routing of these token counts, "this batch" under the routing that ran and not under
    every other, "unsafe" not even under that. `bound`: rows that a rank receives at most under any routing. `formula`
    derives the bound, with its numbers.
    """

    status: Proof
    bound: int
    formula: str

    def words(self, max_recv: int) -> str:
        """The status with its evidence; `max_recv` is the rows that the fullest rank receives in this batch."""
        status = "this batch only" if self.status == "this batch" else self.status
        return (
            f"{status}: the fullest rank receives {max_recv}, any routing of these token counts at most {self.bound} "
            f"({self.formula})"
        )


def prove_limit(limit: int | None, traffic: Traffic) -> LimitProof:
    """Traffic for which a resolved limit (None for off) loses no row.

    A token sends at most one row to a rank, however many of its experts that rank holds, so a rank receives at most the
    sum of all senders' tokens. No smaller bound holds for every routing: where each token has one expert on the same
    rank, which any number of experts and any top-k allow, that rank receives the sum. Rows above the receive buffer's
    capacity are no loss of the limit: they end in OVERFLOW. So the bound is min(sum of tokens, capacity R).
    """
    total = sum(traffic.tokens)
    bound = min(total, traffic.capacity)
    formula = f"sum of tokens over all ranks = {_terms(traffic.tokens)}{total}"
    if bound < total:
        formula = f"min({formula}, capacity R = {bound}) = {bound}"
    if limit is None or limit >= bound:
        return LimitProof(status="proven", bound=bound, formula=formula)
    return LimitProof(status="this batch" if limit >= traffic.max_recv else "unsafe", bound=bound, formula=formula)


def _terms(tokens: Sequence[int]) -> str:
    """The tokens of each rank as a sum, up to the equals sign; empty for a single rank."""
    if len(tokens) == 1:
        return ""
    if len(tokens) <= _MOST_TERMS:
        return "+".join(map(str, tokens)) + " = "
    first = "+".join(map(str, tokens[: _MOST_TERMS // 2]))
    return f"{first}+...+{tokens[-1]} of {len(tokens)} ranks = "


def check_capacity(traffic: Traffic, max_dispatch_tokens_per_rank: int) -> None:
    """Refuse a batch above M and a receiver above R, neither of which MoRI checks, before any row moves.

    Raises:
        Overflow: names the ranks, their numbers and the bound.

    """
    _refuse_above(traffic.tokens, max_dispatch_tokens_per_rank, "holds", "max_dispatch_tokens_per_rank", "send fewer")
    _refuse_above(traffic.total_recv, traffic.capacity, "is to receive", "capacity R", "spread the routing")


def _refuse_above(counts: Sequence[int], bound: int, verb: str, name: str, way_out: str) -> None:
    over = [rank for rank, count in enumerate(counts) if count > bound]
    if over:
        shown = ", ".join(f"rank {rank} {verb} {counts[rank]}" for rank in over[:_SHOWN_RANKS])
        more = f" and {len(over) - _SHOWN_RANKS} ranks more" if len(over) > _SHOWN_RANKS else ""
        message = f"{name} = {counted(bound, 'row')}: {shown}{more}; raise it or {way_out}"
        raise Overflow(message)


def round_up(value: int, step: int) -> int:
    """Round `value` up to a multiple of `step`."""
    return -(-value // step) * step


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
