"""Checks of the kernels under Triton's interpreter, as one JSON object. Run as a script: Triton reads the flag once."""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import ConfigSelector, KernelConfig, LayerShape, Tile
from distbench.experts.triton.launch import Weights, sort, sorted_copy
from distbench.workload.batch import TokenBatch
from distbench.workload.exact_plan import plan_exact
from distbench.workload.inputs import make_workload
from distbench.workload.places import places_of

SHAPE = LayerShape(num_experts=8, num_local_experts=4, hidden_size=256, intermediate_size=128, topk=4)
ROWS = 33
CONFIGS = {
    "swapped": KernelConfig(
        block_m=16,
        gather=True,
        stage1=Tile(n=64, k=64, stages=2, warps=4, swap=True),
        stage2=Tile(n=64, k=64, stages=2, warps=4, swap=True),
    ),
    "atomic": KernelConfig(
        block_m=32,
        gather=False,
        stage1=Tile(n=64, k=128, stages=2, warps=4),
        stage2=Tile(n=128, k=64, stages=2, warps=4),
        mode="atomic",
    ),
    "split": KernelConfig(
        block_m=16,
        gather=False,
        splits=3,
        stage1=Tile(n=64, k=64, stages=2, warps=4),
        stage2=Tile(n=64, k=128, stages=2, warps=4, swap=True),
    ),
}


def main() -> None:
    found: dict[str, bool] = {}
    batch, local, expected = problem()
    for name, config in CONFIGS.items():
        for dtype in (torch.float16, torch.float32):
            output = call(config, batch, local, ROWS, dtype)
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = right(output, expected)
    config, dtype = CONFIGS["swapped"], torch.float32
    for live in (0, 1, 17):
        output = call(config, poisoned(batch, live), local, live, dtype)
        found[f"{live} live"] = right(output[:live], expected[:live])
    found |= mutations(batch, local, expected)
    strange = batch._replace(ids=batch.ids.clone())
    strange.ids[:, 1], strange.ids[:, 2] = -1, 0x7FFF_0000
    kept = batch._replace(ids=torch.where(strange.ids == batch.ids, batch.ids, 7))
    found["ids of no rank"] = same(call(config, strange, local, ROWS, dtype), call(config, kept, local, ROWS, dtype))
    with mock.patch.object(np, "matmul", product_in_order):
        found["bits at any place"] = bits_at_any_place(local)
    found["sort"] = sorts()
    found["copies by place"] = copies()
    json.dump(found, sys.stdout)


def problem() -> tuple[TokenBatch, ExpertWeights, Tensor]:
    workload = make_workload(
        numerics="exact",
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_experts=SHAPE.num_experts,
        topk=SHAPE.topk,
        ep_size=2,
        seed=0,
        routing="uniform",
        tokens_per_rank=(ROWS, ROWS),
        dispatch_dtype="bf16",
        device="cpu",
    )
    batch = workload.tokens(1)
    expected = workload.expected_rows(0, batch)
    assert expected is not None
    mask = (torch.arange(SHAPE.num_experts) < SHAPE.num_local_experts).int()
    return batch, ExpertWeights(*workload.local_weights(0), mask), expected


def call(config: KernelConfig, batch: TokenBatch, local: ExpertWeights, live: int, dtype: torch.dtype) -> Tensor:
    return TritonExperts(ConfigSelector(shape=SHAPE)).run(
        config,
        ExpertInput(batch.hidden.to(dtype), None, batch.weights, batch.ids, torch.tensor([live], dtype=torch.int32)),
        ExpertWeights(local.w1.to(dtype), local.w2.to(dtype), local.mask),
        dtype,
    )


def same(actual: Tensor, expected: Tensor) -> bool:
    wide, other = actual.float().view(torch.int32), expected.float().view(torch.int32)
    return torch.equal(wide, other)


def right(actual: Tensor, expected: Tensor) -> bool:
    """Return whether the kernels' rows equal the oracle's in bf16, or in sums only if the intermediate is float16."""
    if actual.dtype == torch.float16:
        plan = plan_exact(SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.topk, "bf16", SHAPE.num_experts)
        columns = places_of(plan, actual.device).sum_columns
        return same(actual[:, columns], expected[:, columns])
    return same(actual.bfloat16(), expected)


def poisoned(batch: TokenBatch, live: int) -> TokenBatch:
    """Return the batch with poison in rows past `live`, which no kernel may read: NaN, and ids of local experts."""
    hidden, weights, ids = batch.hidden.clone(), batch.weights.clone(), batch.ids.clone()
    hidden[live:], weights[live:], ids[live:] = torch.nan, torch.nan, 1
    return TokenBatch(hidden, None, weights, ids)


def mutations(batch: TokenBatch, local: ExpertWeights, expected: Tensor) -> dict[str, bool]:
    """Return whether the comparison finds deliberate damage."""
    config, dtype = CONFIGS["swapped"], torch.float32
    w1 = local.w1.clone()
    w1[2, 5, 0] += 32
    shifted = local._replace(mask=local.mask.roll(1))
    swapped = local._replace(w2=local.w2[[1, 0, 2, 3]])
    return {
        "mutation: mask": not right(call(config, batch, shifted, ROWS, dtype), expected),
        "mutation: experts": not right(call(config, batch, swapped, ROWS, dtype), expected),
        "mutation: one weight": not right(call(config, batch, local._replace(w1=w1), ROWS, dtype), expected),
        "mutation: live rows": not right(call(config, poisoned(batch, 17), local, ROWS, dtype), expected),
    }


_matmul = np.matmul


def product_in_order(left: Any, right: Any, dtype: Any) -> Any:
    """Replace the product that the interpreter leaves to BLAS, which may round a row by its position in the tile.

    numpy has no BLAS for this type and adds in the order of the columns.
    """
    return _matmul(left, right, dtype=np.longdouble).astype(dtype)


def bits_at_any_place(local: ExpertWeights) -> bool:
    """Return whether a row's bits depend on neither its position nor its neighbours, with gaussian values."""
    generator = torch.Generator().manual_seed(0)
    real = ExpertWeights(
        torch.randn(local.w1.shape, generator=generator) / 16,
        torch.randn(local.w2.shape, generator=generator),
        local.mask,
    )
    batch = TokenBatch(
        torch.randn(ROWS, SHAPE.hidden_size, generator=generator),
        None,
        torch.rand(ROWS, SHAPE.topk, generator=generator),
        torch.rand(ROWS, SHAPE.num_experts, generator=generator).argsort(1)[:, : SHAPE.topk].int(),
    )
    whole = call(CONFIGS["split"], batch, real, ROWS, torch.float16)
    order = torch.randperm(ROWS, generator=generator)[:21]
    part = TokenBatch(batch.hidden[order], None, batch.weights[order], batch.ids[order])
    return same(call(CONFIGS["split"], part, real, 21, torch.float16), whole[order])


def sorts() -> bool:
    """Return whether 1,500 routes of 700 live rows, in several blocks, are in the order of a stable sort."""
    generator, live, rows = torch.Generator().manual_seed(1), 700, 900
    ids = torch.randint(-1, SHAPE.num_experts + 1, (rows, SHAPE.topk), generator=generator, dtype=torch.int32)
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.int32)
    number = torch.tensor([live], dtype=torch.int32)
    nothing = torch.empty(0)
    weights = Weights(torch.empty(4, 1, 1), nothing, None, None, mask)
    placed = sort(ExpertInput(nothing, None, nothing, ids, number), weights, 16)
    position = torch.full((SHAPE.num_experts + 2,), 4)
    position[:-2][mask == 1] = torch.arange(4)
    local = position[ids[:live].flatten().long()]
    order = local.argsort(stable=True)[: int((local < 4).sum())]
    inverse = torch.full_like(local, -1)
    inverse[order] = torch.arange(order.numel())
    counts = torch.bincount(local, minlength=5)[:4]
    tiles = torch.arange(4).repeat_interleave(-(-counts // 16))
    table = placed.experts.view(3, placed.local)
    return (
        torch.equal(placed.order[: order.numel()].long(), order)
        and torch.equal(placed.inverse[: local.numel()].long(), inverse)
        and table[1, :4].tolist() == counts.tolist()
        and table[0, :4].tolist() == (counts.cumsum(0) - counts).tolist()
        and placed.tiles[: tiles.numel() + 1].tolist() == [tiles.numel(), *tiles.tolist()]
    )


def copies() -> bool:
    """Return whether rows, scales and weights stand in the order of places, as cluster_products.cu reads them."""
    generator, rows = torch.Generator().manual_seed(2), 50
    ids = torch.randint(0, SHAPE.num_experts, (rows, 2), generator=generator, dtype=torch.int32)
    mask = (torch.arange(SHAPE.num_experts) < 4).int()
    scales, routing = torch.rand(rows, 2, generator=generator), torch.rand(rows, 2, generator=generator)
    hidden = torch.rand(rows, 256, generator=generator).half()
    given = ExpertInput(hidden, scales, routing, ids, torch.tensor([rows], dtype=torch.int32))
    placed = sort(given, Weights(torch.empty(4, 1, 1), torch.empty(0), None, None, mask), 32)
    order = placed.order[: int((ids < 4).sum())].long()
    copied, turned, weights = sorted_copy(given, placed, 4, cluster=True)
    plain = sorted_copy(given, placed, 4)
    assert turned is not None
    assert plain[1] is not None
    assert weights is not None
    return (
        torch.equal(copied[: order.numel()], hidden[order // 2])
        and torch.equal(turned.T[: order.numel()], scales[order // 2])
        and torch.equal(weights[: order.numel()], routing.flatten()[order])
        and torch.equal(plain[0][: order.numel()], hidden[order // 2])
        and torch.equal(plain[1][: order.numel()], scales[order // 2])
    )


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    main()
