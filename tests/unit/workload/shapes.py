"""Small shapes with the proportions of real models, and how results are compared."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from distbench.errors import InvalidCase
from distbench.workload.batch import TokenBatch
from distbench.workload.exact_plan import ExactPlan
from distbench.workload.inputs import ExactNumerics, Workload, make_workload

SHAPES = {
    "deepseek-v3/28": (256, 72, 16, 8, "bf16"),
    "qwen3-30b-a3b/8": (256, 96, 16, 8, "bf16"),
    "mixtral-8x7b/16": (256, 896, 8, 2, "bf16"),
    "gpt-oss-120b/15": (192, 192, 8, 4, "bf16"),
    "tiny": (256, 128, 8, 4, "bf16"),
    "tiny-odd": (192, 96, 10, 3, "bf16"),
    "tiny fp8": (256, 128, 8, 4, "e4m3fn"),
    "tiny fnuz": (256, 128, 8, 4, "e4m3fnuz"),
    "odd intermediate fp8": (256, 96, 16, 8, "e4m3fn"),
    "many experts a token": (128, 64, 64, 32, "bf16"),
    "one weight": (128, 64, 96, 72, "bf16"),
}


def workload_of(name: str, seed: int = 0, routing: str = "uniform", tokens: int = 6, **changes: Any) -> Workload:
    hidden, inter, experts, topk, dtype = SHAPES[name]
    keys: dict[str, Any] = {
        "numerics": "exact",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_experts": experts,
        "topk": topk,
        "ep_size": 2,
        "seed": seed,
        "routing": routing,
        "tokens_per_rank": (tokens, tokens),
        "dispatch_dtype": "bf16" if dtype == "bf16" else "fp8",
        "fp8_format": "e4m3fnuz" if dtype == "e4m3fnuz" else "e4m3fn",
        "device": "cpu",
    }
    return make_workload(**(keys | changes))


def random_workload(seed: int) -> Workload:
    """Layer of a random shape: EP 1 to 4, odd sizes, both e4m3 formats, every combine and intermediate."""
    rng = random.Random(seed)
    while True:
        fp8 = rng.choice(["bf16", "bf16", "e4m3fn", "e4m3fnuz"])
        ep_size, topk = rng.choice([1, 2, 3, 4]), rng.randint(1, 8)
        experts = ep_size * max(rng.randint(1, 12), -(-topk // ep_size))
        keys: dict[str, Any] = {
            "hidden_size": rng.randint(4, 300) if fp8 == "bf16" else 128 * rng.randint(1, 4),
            "intermediate_size": rng.randint(2, 260) if rng.random() < 0.6 else 128 * rng.randint(1, 2),
            "num_experts": experts,
            "topk": topk,
            "ep_size": ep_size,
            "routing": rng.choice(["uniform", "zipf:1.2", "duplicates"]),
            "tokens_per_rank": (rng.randint(1, 16),) * ep_size,
            "dispatch_dtype": "bf16" if fp8 == "bf16" else "fp8",
            "fp8_format": rng.choice(["e4m3fn", "e4m3fnuz"]) if fp8 == "bf16" else fp8,
            "combine_quant": rng.choice(["none", "none", "fp8_direct_cast", "fp8_blockwise"]),
            "intermediate": "bf16" if fp8 == "bf16" else rng.choice(["bf16", "e4m3"]),
        }
        try:
            return make_workload(numerics="exact", seed=rng.randint(0, 2**60), device="cpu", **keys)
        except InvalidCase:
            continue


def plan_of_workload(workload: Workload) -> ExactPlan:
    assert isinstance(workload.numerics, ExactNumerics)
    return workload.numerics.plan


def some_routes_nowhere(batch: TokenBatch, seed: int) -> TokenBatch:
    """Batch with a fifth of its ids set to -1."""
    missing = torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    return batch._replace(ids=batch.ids.masked_fill(missing, -1))


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


def changed_rows(before: Tensor | None, after: Tensor | None) -> list[int]:
    assert before is not None
    assert after is not None
    return (before.view(torch.int16) != after.view(torch.int16)).any(1).nonzero().flatten().tolist()
