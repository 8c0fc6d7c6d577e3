"""Tensors of one part, checked against the case and each other before inputs are generated for them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from distbench.case.spec import Case
from distbench.case.stages import Arm
from distbench.report.bundle.layout import MAX_TOKENS
from distbench.transport.mori.config import sum_order
from distbench.transport.sum_order import SumOrder
from distbench.utils.text import counted
from distbench.verify.records import Token
from distbench.workload.batch import TokenBatch


class ArmRows(NamedTuple):
    """One arm's recorded rows on one rank; `oracle` has the expected expert rows, None where none were recorded."""

    arm: str
    sources: Tensor
    slots: Tensor
    cut: Tensor
    received: TokenBatch
    experts: Tensor
    oracle: Tensor | None


class RankTensors(NamedTuple):
    """One rank's record: its routing, its failing `tokens` as sent and as combined by arm, and the arms' rows.

    `oracle` has the expected tokens, None where none were recorded.
    """

    routing: Tensor
    tokens: Tensor
    sent: TokenBatch
    combined: dict[str, Tensor]
    arms: list[ArmRows]
    oracle: Tensor | None


def rank_tensors(rank: int, tensors: dict[str, Tensor], case: Case, listed: Sequence[Token]) -> RankTensors:
    """Tensors of a part of `rank`, whose failing tokens are among those `listed`.

    Raises:
        ValueError: a tensor is missing, or has a wrong number of rows.

    """
    index = _present(tensors, "token.index")
    _refuse_others([(rank, token) for token in index.tolist()], listed, "token.index")
    return RankTensors(
        routing=routing_of(rank, tensors, case),
        tokens=index,
        sent=_batch(tensors, "token", len(index), case),
        combined={arm: _sized(tensors, f"combined.{arm}", len(index)) for arm in Arm if f"combined.{arm}" in tensors},
        arms=[_rows(arm, tensors, case, listed) for arm in Arm if f"{arm}.sources" in tensors],
        oracle=_sized(tensors, "token.oracle", len(index)) if "token.oracle" in tensors else None,
    )


def routing_of(rank: int, tensors: dict[str, Tensor], case: Case) -> Tensor:
    """Routing of the first tokens of `rank`: int32 [n, k].

    Raises:
        ValueError: it is missing, or has more tokens than the rank.

    """
    routing = _present(tensors, "routing")
    if len(routing) > case.tokens[rank]:
        message = f"routing has {counted(len(routing), 'token')}, rank {rank} has {case.tokens[rank]}"
        raise ValueError(message)
    return routing


def _rows(arm: str, tensors: dict[str, Tensor], case: Case, listed: Sequence[Token]) -> ArmRows:
    sources, cut = tensors[f"{arm}.sources"], _present(tensors, f"{arm}.cut")
    named = [(rank, token) for rank, token in [*sources.tolist(), *cut[:, :2].tolist()]]
    _refuse_others(named, listed, f"{arm}.sources")
    rows = len(sources)
    slots, experts = (_sized(tensors, f"{arm}.{name}", rows) for name in ("slots", "experts"))
    oracle = _sized(tensors, f"{arm}.oracle", rows) if f"{arm}.oracle" in tensors else None
    return ArmRows(arm, sources, slots, cut, _batch(tensors, arm, rows, case), experts, oracle)


def _refuse_others(found: Sequence[Token], listed: Sequence[Token], name: str) -> None:
    if len(found) > MAX_TOKENS or len(set(found)) != len(found):
        message = f"{name} names {counted(len(found), 'token')}, allowed are {MAX_TOKENS}, each once"
        raise ValueError(message)
    if not set(found) <= set(listed):
        message = f"{name} names tokens that the manifest does not list"
        raise ValueError(message)


def _batch(tensors: dict[str, Tensor], part: str, rows: int, case: Case) -> TokenBatch:
    return TokenBatch(
        hidden=_sized(tensors, f"{part}.hidden", rows),
        scales=_sized(tensors, f"{part}.scales", rows) if case.dispatch_dtype == "fp8" else None,
        weights=_sized(tensors, f"{part}.weights", rows),
        ids=_sized(tensors, f"{part}.ids", rows),
    )


def _sized(tensors: dict[str, Tensor], name: str, rows: int) -> Tensor:
    found = _present(tensors, name)
    if len(found) != rows:
        message = f"{name} has {counted(len(found), 'row')}, not {rows}"
        raise ValueError(message)
    return found


def _present(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        message = f"there is no {name}"
        raise ValueError(message)
    return tensors[name]


def moves_local_slots(facts: Mapping[str, Any]) -> bool:
    """Whether the transport whose facts a bundle holds moves slots of the receiver's experts alone."""
    return facts.get("local_slots") is True


def recorded_order(facts: Mapping[str, Any]) -> SumOrder:
    """Order of addition of the transport whose facts a bundle holds, which may hold anything.

    A plugin's order is a fact of its own, MoRI's follows from the kernel.
    """
    stated = facts.get("sum_order")
    if isinstance(stated, dict):
        with contextlib.suppress(msgspec.ValidationError):
            plain = SumOrder()._asdict()
            order = msgspec.convert([stated.get(name, plain[name]) for name in SumOrder._fields], SumOrder)
            return order._replace(node_ranks=max(order.node_ranks, 0))
    kernel, node_ranks, quant = facts.get("kernel"), facts.get("gpu_per_node"), facts.get("quant", "none")
    per_node = node_ranks if isinstance(node_ranks, int) and node_ranks > 0 else 0
    return sum_order(str(kernel), per_node, str(quant))
