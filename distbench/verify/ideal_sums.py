"""Tokens as an ideal combine adds up the ranks' ideal rows: plain, or quantised on the trip back as MoRI does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distbench.transport.mori.emulated.codec import Codec, make_codec
from distbench.transport.sum_order import SumOrder
from distbench.verify.combine_model import Contributions, added
from distbench.verify.ideal import Ideal, rounding_variance

# Upper bound of a format's step relative to the value at the step.
_RELATIVE_STEP = {"fp8_direct_cast": 2.0**-3, "fp8_blockwise": 2.0**-3, "fp4_blockwise": 2.0**-1}


class Quantised(NamedTuple):
    """Quantisation of rows on the trip back, and the largest relative step of the format."""

    codec: Codec
    step: float


def quantised_way(facts: Mapping[str, Any], columns: int, fp8: torch.dtype) -> Quantised | None:
    """Return the quantisation of bf16 rows [m, columns] that a transport's facts state; None where it has none.

    `fp8` is the device's fp8 type.
    """
    quant = str(facts.get("quant", "none"))
    if quant not in _RELATIVE_STEP:
        return None
    codec = make_codec(quant, torch.bfloat16, columns, external=bool(facts.get("external")), fp8=fp8)
    return Quantised(codec, _RELATIVE_STEP[quant])


def combined(
    rows: Contributions,
    variances: Contributions,
    by_order: Contributions,
    order: SumOrder,
    way: Quantised | None,
) -> Ideal:
    """Return each token's ideal sum, of `Ideal.rows` [n, c, H], `variance` [n, c, H] and `order` [n, c, 2]."""
    variance, together = variances.rows.float().sum(1), by_order.rows.sum(1)
    if way is None:
        total = added(rows, order)
        several = (rows.ranks >= 0).sum(1, keepdim=True) > 1
        variance += rounding_variance(total) * several * (2 if order.node_ranks else 1)
        return Ideal(total, variance, together)
    sums, spread = _quantised_sum(rows, order, way)
    total = sums.to(rows.rows.dtype)
    return Ideal(total, variance + spread + rounding_variance(total), together)


def _quantised_sum(rows: Contributions, order: SumOrder, way: Quantised) -> tuple[Tensor, Tensor]:
    """Return the float32 sums [n, H], added rank by rank or node by node, and the variance of their rounding errors."""
    total = torch.zeros_like(rows.rows[:, 0], dtype=torch.float32)
    variance = torch.zeros_like(total)
    node_of = rows.ranks.div(order.node_ranks or 1, rounding_mode="floor") if order.node_ranks else rows.ranks * 0
    for node in range(int(node_of.max()) + 1 if node_of.numel() else 0):
        partial = torch.zeros_like(total)
        for place in range(rows.ranks.shape[1]):
            here = ((rows.ranks[:, place] >= 0) & (node_of[:, place] == node)).nonzero().flatten()
            if not here.numel():
                continue
            row = rows.rows[here, place]
            packed = way.codec.pack(row)
            partial[here] = way.codec.add(partial[here], packed)
            arrived = way.codec.add(torch.zeros_like(partial[here]), packed)
            variance[here] += _lost(row.float(), arrived, way.step)
        if order.node_ranks:
            rounded = way.codec.round(partial)
            variance += _lost(partial, rounded, way.step)
            partial = rounded
        total += partial
    return total, variance


def _lost(before: Tensor, after: Tensor, step: float) -> Tensor:
    """Return the variance of a rounding error: uniform within its step, plus the row's mean square error near zero."""
    return (before * step).square() / 12 + (after - before).square().mean(1, keepdim=True)
