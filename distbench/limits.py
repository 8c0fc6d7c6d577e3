"""The limit: how many rows of the receive buffer reach the experts, as asked for and as resolved.

`SGLANG_MORI_MOE_MAX_INPUT_TOKENS` is a number of rows, 0 meaning off. A case may also name the number by what it is
derived from, so that one case file serves any routing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from distbench.errors import InvalidCase, Overflow
from distbench.values import shown

DERIVED_LIMITS = ("max-recv", "sum", "sum32", "pow2", "capacity")
ALLOWED_LIMITS = (
    "off, a whole number of rows from 1 up, max-recv, max-recv+N, max-recv-N, sum, sum32, pow2, capacity or capacity+N"
)

_MAX_DIGITS = 12
_OFFSET = re.compile(rf"(max-recv[+-]|capacity\+)(\d{{1,{_MAX_DIGITS}}})", re.ASCII)

RECV_BOUND_STEP = 32
_SHOWN_RANKS = 8


class Traffic(msgspec.Struct, frozen=True):
    """What the routing makes of a case, known before any payload moves.

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
    """Return the canonical text of a limit: `off`, digits, or one of `DERIVED_LIMITS`, some with `+N` or `-N`.

    Raises:
        InvalidCase: not one of those. A negative number is refused because production reads it as off.

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
    """Return the number of rows to cut to, or None where the limit is off.

    `sum` is the provable bound (one row per token and destination rank); `sum32` rounds it up to 32, at least 32 and
    at most R, as newer SGLang does with SGLANG_MORI_RECV_BOUND; `pow2` rounds it up to a power of two. `capacity` is R.

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
            f"limit = {limit}: comes out as {rows} rows (the fullest rank receives {traffic.max_recv}), "
            "which production reads as off; use off or give a rank more tokens"
        )
        raise InvalidCase(message)
    return rows


def recv_bound(traffic: Traffic) -> int | None:
    """Rows that newer SGLang cuts to on its own (SGLANG_MORI_RECV_BOUND); None where no sender has a row."""
    return resolve_limit("sum32", traffic) if sum(traffic.tokens) else None


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
        message = f"{name} = {bound} rows: {shown}{more}; raise it or {way_out}"
        raise Overflow(message)


def round_up(value: int, step: int) -> int:
    """Round `value` up to a multiple of `step`."""
    return -(-value // step) * step


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
