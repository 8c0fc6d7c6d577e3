"""A trace of a synthetic kind of routing: the same popularity of experts in all steps of a layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.workload.routing import route
from distbench.workload.routing_spec import ExpertGroup, Routing, check_routing
from distbench.workload.trace_file import MOST_IDS, MOST_SLICES, Header, Ids

_IDS_AT_ONCE = 1 << 22


def header_of(routing: Routing, group: ExpertGroup, shape: tuple[int, int, int], seed: int) -> Header:
    """Header of a trace of `shape`: steps, layers, and tokens of each rank.

    Raises:
        InvalidCase: the routing does not fit the ranks, or there are too many tokens.

    """
    _check(routing, group, shape)
    steps, layers, _ = shape
    known = {step: list(range(layers)) for step in range(steps)}
    return Header("", group.num_experts, group.topk, group.ep_size, f"{routing}, seed {seed}", known)


def drawn(routing: Routing, group: ExpertGroup, shape: tuple[int, int, int], seed: int) -> Iterator[Ids]:
    """Experts of each step in each layer, step by step, int32 [tokens of all ranks, k]; many steps are drawn at once.

    Token t of a rank in step s is the rank's token t + s * tokens of each rank, and layer l has the seed + l.
    """
    steps, layers, tokens = shape
    count = tokens * group.ep_size
    together = max(_IDS_AT_ONCE // max(count * layers * group.topk, 1), 1)
    ranks = torch.arange(group.ep_size).repeat_interleave(tokens)
    numbers = torch.arange(tokens).repeat(group.ep_size)
    with Meter("route tokens", steps * layers) as meter:
        for first in range(0, steps, together):
            here = torch.arange(first, min(first + together, steps)).unsqueeze(1)
            some = (numbers + here * tokens).flatten()
            blocks = []
            for layer in range(layers):
                ids = route(routing, group, seed=seed + layer, ranks=ranks.repeat(len(here)), tokens=some)
                blocks.append(ids.view(len(here), count, group.topk).numpy())
                meter.done += len(here)
            for step in range(len(here)):
                yield from (np.ascontiguousarray(block[step]) for block in blocks)


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
