"""One pass through the MoE layer on one rank: dispatch, truncate, experts, combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distbench.experts.base import Experts, check_values
from distbench.transport.base import Dispatched, Transport
from distbench.truncation import ExpertInput
from distbench.workload.batch import TokenBatch

Cut = Callable[[Dispatched], ExpertInput]


class ExpertWeights(NamedTuple):
    """A rank's experts: w1 [El, 2I, H], w2 [El, H, I], both bf16; mask [E] int32, 1 where the expert is local."""

    w1: Tensor
    w2: Tensor
    mask: Tensor


class Inspector(Protocol):
    """Looks at what a pass made before combine lets the buffers go."""

    def __call__(self, sources: Tensor, dispatched: Dispatched, given: ExpertInput, expert_out: Tensor) -> None:
        """See sources [total_recv, 2], the receive buffer, what the experts were given, and their output."""


def run_layer(  # noqa: PLR0913 - the parts of a layer
    batch: TokenBatch,
    weights: ExpertWeights,
    transport: Transport,
    experts: Experts,
    cut: Cut,
    inspect: Inspector | None,
    mark: Callable[[str], None],
) -> Tensor:
    """Return this rank's combined tokens, bf16 [n, H]; `mark` hears of each stage as it begins.

    Without `inspect` nothing is looked at on the host. Collective: every rank calls it, with no tokens too.
    """
    mark("dispatch")
    dispatched = transport.dispatch(batch)
    mark("truncate")
    given = cut(dispatched)
    mark("experts")
    if inspect is not None:
        check_values(experts, given.ids, weights.mask, given.num_local_tokens)
    expert_out = run_experts(experts, given, weights)
    if inspect is not None:
        mark("check")
        inspect(transport.sources(), dispatched, given, expert_out)
    mark("combine")
    return transport.combine(expert_out, batch.ids)


def run_experts(experts: Experts, given: ExpertInput, weights: ExpertWeights) -> Tensor:
    """Call the experts as production calls `aiter.fused_moe`: [M, H] bf16."""
    return experts(
        given.hidden,
        weights.w1,
        weights.w2,
        given.weights,
        given.ids,
        expert_mask=weights.mask,
        num_local_tokens=given.num_local_tokens,
        a1_scale=given.scales,
        dtype=torch.bfloat16,
    )
