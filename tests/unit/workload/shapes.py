"""Small shapes with the proportions of real models, and how results are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.workload.inputs import Workload, make_workload

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


def workload_of(name: str, seed: int = 0, routing: str = "uniform", tokens: int = 6) -> Workload:
    hidden, inter, experts, topk, dtype = SHAPES[name]
    return make_workload(
        numerics="exact",
        hidden_size=hidden,
        intermediate_size=inter,
        num_experts=experts,
        topk=topk,
        ep_size=2,
        seed=seed,
        routing=routing,
        tokens_per_rank=(tokens, tokens),
        dispatch_dtype="bf16" if dtype == "bf16" else "fp8",
        fp8_format="e4m3fnuz" if dtype == "e4m3fnuz" else "e4m3fn",
        device="cpu",
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


def changed_rows(before: Tensor | None, after: Tensor | None) -> list[int]:
    assert before is not None
    assert after is not None
    return (before.view(torch.int16) != after.view(torch.int16)).any(1).nonzero().flatten().tolist()
