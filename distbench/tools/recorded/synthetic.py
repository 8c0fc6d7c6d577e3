"""A trace of a synthetic kind of routing: the same popularity of experts in all steps of a layer."""

from __future__ import annotations

import numpy as np
import torch

from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.workload.routing import route
from distbench.workload.routing_spec import ExpertGroup, Routing, check_routing
from distbench.workload.trace_file import MOST_IDS, MOST_SLICES, Header, Slice


def synthesise(
    routing: Routing, group: ExpertGroup, shape: tuple[int, int, int], seed: int
) -> tuple[Header, dict[tuple[int, int], Slice]]:
    """Header and slices of `shape`: steps, layers, and tokens of each rank.

    Raises:
        InvalidCase: the routing does not fit the ranks, or there are too many tokens.

    """
    steps, layers, tokens = shape
    _check(routing, group, shape)
    counts = np.full(group.ep_size, tokens, dtype=np.int64)
    ranks = torch.arange(group.ep_size).repeat_interleave(tokens)
    numbers = torch.arange(tokens).repeat(group.ep_size)
    slices: dict[tuple[int, int], Slice] = {}
    with Meter("route tokens", steps * layers) as meter:
        for step in range(steps):
            for layer in range(layers):
                ids = route(routing, group, seed=seed + layer, ranks=ranks, tokens=numbers + step * tokens)
                slices[step, layer] = Slice(ids.numpy(), counts)
                meter.done += 1
    known = {step: list(range(layers)) for step in range(steps)}
    return Header("", group.num_experts, group.topk, group.ep_size, f"{routing}, seed {seed}", known), slices


def _check(routing: Routing, group: ExpertGroup, shape: tuple[int, int, int]) -> None:
    steps, layers, tokens = shape
    if group.num_experts % group.ep_size or group.topk > group.num_experts:
        message = (
            f"trace synth: {group.num_experts} experts, top-{group.topk}, on {group.ep_size} ranks; give a multiple of "
            "the ranks, and no more experts of a token than there are"
        )
        raise InvalidCase(message)
    if routing.trace is not None:
        message = f"trace synth: routing = {routing} is a recording; give a kind of routing, or use the file"
        raise InvalidCase(message)
    check_routing(routing, group)
    total = steps * layers * tokens * group.ep_size * group.topk
    if total > MOST_IDS or steps * layers > MOST_SLICES or steps * tokens >= 1 << 31:
        message = (
            f"trace synth: {total} experts in {steps * layers} steps and layers; at most {MOST_IDS} in {MOST_SLICES}"
        )
        raise InvalidCase(message)
