"""The rows that a case cuts to, by its limit or as SGLang itself does (SGLANG_MORI_RECV_BOUND), by release.

Sources: `_select_recv_cap` and `mori_recv_bound` of the wheel 0.5.23 (`token_dispatcher/moriep.py`), and
`_mori_decode_recv_bound` of 0.5.19 to 0.5.21 (`moe_runner/aiter.py`), which bounds decode batches only.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from distbench.case.limits import RECV_BOUND_STEP, Traffic, resolve_limit, round_up
from distbench.case.sglang_releases import NEWEST, RECV_BOUND, VARIABLES, rules_of
from distbench.case.spec import Case
from distbench.errors import InvalidCase, Unsupported
from distbench.transport.mori.config import production_kernel
from distbench.verify.records import ResolvedCase

_VERIFIED = ("IntraNode", "AsyncLL")


class Bound(NamedTuple):
    """Rows of the bound; None with the reason where production hands the whole receive buffer to the experts."""

    rows: int | None
    reason: str = ""


def limit_rows(case: Case, traffic: Traffic, local_ranks: int | None = None) -> int | None:
    """Rows that the case cuts to, by its limit or by the bound of SGLang's release; None for no cut.

    Raises:
        InvalidCase: as `resolve_limit` and `recv_bound`, which raises Unsupported too.

    """
    if case.limit_key == "recv_bound":
        return recv_bound(case, local_ranks).rows
    return resolve_limit(case.limit, traffic)


def recv_bound(case: Case, local_ranks: int | None = None) -> Bound:
    """Bound of SGLang's release for the case, in a launch of `local_ranks` on each node; None: all are on one node.

    Raises:
        InvalidCase: invalid `sender_rows` or `sglang_version`.
        Unsupported: the metadata is stale on some ranks only; production then cuts on the others alone, and so does a
            caller, but no arm of distbench's own.

    """
    rule = rules_of(case.sglang_version).recv_bound
    told = parse_sender_rows(case)
    if not rule:
        return Bound(None, f"{_release(case)} has none ({VARIABLES[RECV_BOUND]})")
    if rule == "routes":
        return _by_routes(case, told)
    reason = _unproved(case, told, local_ranks)
    if reason:
        return Bound(None, f"{_release(case)}: {reason}")
    rows = round_up(sum(case.tokens), RECV_BOUND_STEP)
    if not 0 < rows < case.capacity:
        return Bound(None, f"{_release(case)}: a bound of {rows} rows is ignored for a buffer of {case.capacity}")
    return Bound(rows)


def sglang_rows(resolved: ResolvedCase, rank: int, local_ranks: int | None = None) -> int:
    """Rows that SGLang gives to the experts on `rank`, by its limit or its receive bound.

    Metadata that is stale for other ranks alone does not keep a rank from cutting.
    """
    case, capacity = resolved.case, resolved.traffic.capacity
    if case.limit_key == "limit":
        return min(resolved.limit or capacity, capacity)
    told = parse_sender_rows(case)
    fresh = len(told) == case.ep_size and told[rank] == case.tokens[rank]
    if not fresh or _unproved(msgspec.structs.replace(case, sender_rows=""), case.tokens, local_ranks):
        return capacity
    rows = round_up(sum(told), RECV_BOUND_STEP)
    return rows if 0 < rows < capacity and min(told) >= 0 else capacity


def _by_routes(case: Case, told: tuple[int, ...]) -> Bound:
    if len(told) < case.ep_size:
        reason = f"the metadata has {len(told)} of {case.ep_size} senders"
        return Bound(None, f"{_release(case)}: {reason}")
    rows = sum(told) * case.topk_slots
    if not 0 < rows < case.capacity:
        return Bound(None, f"{_release(case)}: a bound of {rows} rows is ignored for a buffer of {case.capacity}")
    return Bound(rows)


def _unproved(case: Case, told: tuple[int, ...], local_ranks: int | None) -> str:
    """Reason why the newer rule rejects the bound; empty for none."""
    kernel = production_kernel(case, local_ranks)
    if case.two_batch_overlap:
        return "not with two-batch overlap"
    if kernel not in _VERIFIED:
        return f"{kernel} is none of {' and '.join(_VERIFIED)}"
    if case.ep_size == 1 or case.tp_size not in (0, case.ep_size):
        return f"tp_size {case.tp_size or case.ep_size} with {case.ep_size} ranks"
    if len(told) != case.ep_size or min(told) < 0:
        return f"the metadata has {len(told)} senders, negative ones among them or not as many as ranks"
    stale = [rank for rank, count in enumerate(told) if count != case.tokens[rank]]
    if stale and len(stale) < case.ep_size and case.caller != "sglang":
        message = (
            f"sender_rows = {case.sender_rows!r:.80}: stale on {len(stale)} of {case.ep_size} ranks, the first is rank "
            f"{stale[0]}; production cuts on the others alone, distbench on all ranks alike: give the tokens, or "
            "other numbers for every rank"
        )
        raise Unsupported(message)
    if stale and len(stale) < case.ep_size:
        return f"the metadata is stale on {len(stale)} of {case.ep_size} ranks, and the caller cuts on the others alone"
    return "the metadata is not of this batch" if stale else ""


def parse_sender_rows(case: Case) -> tuple[int, ...]:
    """Tokens of each rank as the scheduler's metadata has them: `sender_rows`, or the case's own tokens.

    Raises:
        InvalidCase: `sender_rows` is no list of whole numbers.

    """
    if not case.sender_rows:
        return case.tokens
    try:
        return tuple(int(part) for part in case.sender_rows.split(","))
    except ValueError as error:
        message = f"sender_rows = {case.sender_rows!r:.80}: give whole numbers joined by commas, such as 9,7"
        raise InvalidCase(message) from error


def _release(case: Case) -> str:
    return f"SGLang {case.sglang_version or NEWEST}"
