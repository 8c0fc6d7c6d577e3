"""One rank's part of a layer on the device, for trials of kernels, and the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import KernelConfig, LayerShape
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload, make_workload

GRAPH_CALLS = 3
_REPLAYS = 7
_DRAWN_AT_ONCE = 4096


class TunedLayer(NamedTuple):
    """Rank 0's part of a layer on the device."""

    workload: Workload
    local: ExpertWeights

    def received(self, rows: int) -> TokenBatch:
        """Return the first `rows` rows that rank 0 would receive: those with at least one of its experts."""
        device, first = self.local.mask.device, 0
        chosen = torch.empty(0, dtype=torch.int64, device=device)
        while chosen.numel() < rows:
            tokens = torch.arange(first, first + _DRAWN_AT_ONCE, device=device)
            ids = self.workload.token_rows(torch.zeros_like(tokens), tokens).ids
            chosen = torch.cat([chosen, tokens[(ids < self.workload.experts_per_rank).any(1)]])
            first += _DRAWN_AT_ONCE
        return self.workload.token_rows(torch.zeros_like(chosen[:rows]), chosen[:rows])


def make_layer(shape: LayerShape, numerics: str, device: str = "cuda") -> TunedLayer:
    """Return rank 0's part of a uniformly routed layer."""
    workload = make_workload(
        numerics="exact" if numerics == "exact" else "gaussian",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        topk=shape.topk,
        ep_size=shape.num_experts // shape.num_local_experts,
        seed=0,
        routing="uniform",
        tokens_per_rank=(0,) * (shape.num_experts // shape.num_local_experts),
        dispatch_dtype=shape.quant,
        intermediate="e4m3" if shape.quant == "fp8" else "bf16",
        device=device,
    )
    mask = (torch.arange(shape.num_experts, device=device) < shape.num_local_experts).int()
    return TunedLayer(workload, ExpertWeights(*workload.local_weights(0), mask))


def run(
    experts: TritonExperts, local: ExpertWeights, batch: TokenBatch, live: Tensor, config: KernelConfig | None = None
) -> Tensor:
    """Call the experts on `batch`, of which `live` [1] rows count, with the given configuration or their own choice."""
    given = ExpertInput(*batch, num_local_tokens=live)
    return experts(given, local) if config is None else experts.run(config, given, local)


def capture(call: Callable[[], object], calls: int = GRAPH_CALLS) -> Callable[[], None]:
    """Return a function that replays `calls` calls of `call` from a CUDA graph; it has run once."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    return graph.replay


def graph_us(call: Callable[[], object], calls: int = GRAPH_CALLS, replays: int = _REPLAYS) -> list[float]:
    """Return microseconds of `call` in a CUDA graph of `calls` calls, one number per replay."""
    replay = capture(call, calls)
    return [time_us(replay) / calls for _ in range(replays)]


def time_us(call: Callable[[], object]) -> float:
    """Return the device time of `call` in microseconds, between two events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000
