"""The Triton experts on a GPU: the oracle's bits in every bucket, independence of neighbours, and CUDA graphs."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest
import torch
from torch import Tensor

from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.cluster_products import is_hopper
from distbench.experts.triton.config import ConfigSelector, LayerShape, Quant, cluster_config, heuristic
from distbench.tools.tune.trial import TunedLayer, make_layer, run
from distbench.workload.batch import TokenBatch

pytestmark = pytest.mark.gpu

TINY = LayerShape(num_experts=16, num_local_experts=4, hidden_size=256, intermediate_size=128, topk=4)
ODD = LayerShape(num_experts=10, num_local_experts=5, hidden_size=192, intermediate_size=96, topk=3)
LITE = LayerShape(num_experts=64, num_local_experts=8, hidden_size=2048, intermediate_size=1408, topk=6)


def number(rows: int) -> Tensor:
    return torch.tensor([rows], dtype=torch.int32, device="cuda")


def experts(shape: LayerShape) -> TritonExperts:
    return TritonExperts(ConfigSelector(shape=shape))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


def padded(batch: TokenBatch, rows: int) -> TokenBatch:
    """Batch in a buffer of `rows` rows; rows past the batch are NaN with ids of local experts."""
    parts = []
    for part in batch:
        if part is not None:
            junk = torch.full((rows - len(part), part.shape[1]), torch.nan if part.is_floating_point() else 1.0)
            parts.append(torch.cat([part, junk.to(part)]))
    return TokenBatch(parts[0], None if batch.scales is None else parts[1], *parts[-2:])


@pytest.mark.parametrize("quant", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", [TINY, ODD, LITE], ids=["tiny", "odd", "lite"])
def test_every_bucket_gives_the_bits_of_the_oracle(shape: LayerShape, quant: Literal["bf16", "fp8"]) -> None:
    if quant == "fp8" and shape.hidden_size % 128:
        pytest.skip("fp8 rows have a scale for each 128 columns")
    shape = msgspec.structs.replace(shape, quant=quant)
    layer = make_layer(shape, "exact")
    for live, rows in ((1, 1), (5, 8), (33, 64), (200, 256), (700, 1024), (700, 4096), (3000, 3000), (64, 32768)):
        batch = layer.received(live)
        output = run(experts(shape), layer.local, padded(batch, rows), number(live))
        expected = layer.workload.expected_rows(0, batch)
        assert expected is not None
        assert torch.equal(bits(output[:live]), bits(expected)), (live, rows)


@pytest.mark.parametrize("mode", ["reduce", "atomic"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("quant", ["bf16", "fp8"])
def test_split_and_atomic_kernels_give_the_bits_of_the_oracle(
    mode: str, splits: int, quant: Literal["bf16", "fp8"]
) -> None:
    shape = msgspec.structs.replace(LITE, quant=quant)
    layer = make_layer(shape, "exact")
    batch = layer.received(40)
    expected = layer.workload.expected_rows(0, batch)
    assert expected is not None
    config = msgspec.structs.replace(heuristic(shape, 40), mode=mode, splits=splits)
    output = run(experts(shape), layer.local, batch, number(40), config)
    assert torch.equal(bits(output), bits(expected))


@pytest.mark.parametrize("quant", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", [TINY, LITE], ids=["tiny", "lite"])
def test_kernels_in_cuda_give_the_bits_of_the_oracle_and_of_any_place(shape: LayerShape, quant: Quant) -> None:
    if not is_hopper():
        pytest.skip("the kernels in CUDA C++ are for Hopper")
    shape = msgspec.structs.replace(shape, quant=quant)
    config, layer = cluster_config(quant), make_layer(shape, "exact")
    for live, rows in ((0, 8), (1, 1), (40, 64), (300, 512), (1500, 1500), (6000, 8192)):
        batch = layer.received(live)
        output = run(experts(shape), layer.local, padded(batch, rows), number(live), config)
        expected = layer.workload.expected_rows(0, batch)
        assert expected is not None
        assert torch.equal(bits(output[:live]), bits(expected)), (live, rows)
    layer = make_layer(shape, "gaussian")
    batch = layer.received(3000)
    whole = run(experts(shape), layer.local, batch, number(3000), config)
    order = torch.randperm(3000, device="cuda")[:1000]
    part = TokenBatch(*(None if one is None else one[order] for one in batch))  # type: ignore[arg-type]
    output = run(experts(shape), layer.local, part, number(1000), config)
    assert torch.equal(bits(output), bits(whole[order]))
    assert not whole.isnan().any()


def test_recorded_call_gives_the_bits_of_the_first_with_other_rows() -> None:
    layer, one = make_layer(LITE, "exact"), experts(LITE)
    for batch in (layer.received(64), _other_rows(layer), layer.received(64)):
        rows = TokenBatch(*(None if part is None else part[:64].clone() for part in batch))  # type: ignore[arg-type]
        expected = layer.workload.expected_rows(0, rows)
        assert expected is not None
        kept = [run(one, layer.local, rows, number(64)) for _ in range(3)]
        assert all(torch.equal(bits(output), bits(expected)) for output in kept)


def test_changed_weight_changes_the_bits() -> None:
    layer = make_layer(LITE, "exact")
    batch = layer.received(64)
    layer.local.w2[0, 0, :] += 1
    output = run(experts(LITE), layer.local, batch, number(64))
    expected = layer.workload.expected_rows(0, batch)
    assert expected is not None
    assert not torch.equal(bits(output), bits(expected))


@pytest.mark.parametrize("quant", ["bf16", "fp8"])
@pytest.mark.parametrize("rows", [64, 1024, 4096])
def test_bits_of_a_row_do_not_depend_on_its_position(rows: int, quant: Literal["bf16", "fp8"]) -> None:
    shape = msgspec.structs.replace(LITE, quant=quant)
    layer = make_layer(shape, "gaussian")
    batch, config = layer.received(rows), heuristic(shape, rows)
    whole = run(experts(shape), layer.local, batch, number(rows), config)
    order = torch.randperm(rows, device="cuda")[: rows // 2 + 1]
    part = TokenBatch(*(None if part is None else part[order] for part in batch))  # type: ignore[arg-type]
    output = run(experts(shape), layer.local, part, number(order.numel()), config)
    assert torch.equal(bits(output), bits(whole[order]))
    assert not whole.isnan().any()


def test_gaussian_rows_are_close_to_a_float64_product() -> None:
    layer = make_layer(LITE, "gaussian")
    batch = layer.received(50)
    output = run(experts(LITE), layer.local, batch, number(50)).double()
    expected = torch.zeros_like(output)
    for expert in range(LITE.num_local_experts):
        gate, up = (batch.hidden.double() @ layer.local.w1[expert].double().T).chunk(2, 1)
        weight = torch.where(batch.ids == expert, batch.weights, 0.0).sum(1, keepdim=True)
        expected += weight * ((torch.nn.functional.silu(gate) * up) @ layer.local.w2[expert].double().T)
    assert (output - expected).norm() / expected.norm() < 1e-2


def test_graph_replays_with_other_rows_and_routings() -> None:
    layer = make_layer(LITE, "exact")
    batch, live = padded(layer.received(100), 128), number(100)
    one = experts(LITE)
    run(one, layer.local, batch, live)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(one, layer.local, batch, live)
    everything = _other_rows(layer)
    for rows in (128, 1, 0, 77):
        fresh = TokenBatch(*(None if part is None else part[:rows] for part in everything))  # type: ignore[arg-type]
        for target, source in zip(batch, padded(fresh, 128), strict=True):
            if target is not None and source is not None:
                target.copy_(source)
        live.fill_(rows)
        output.fill_(torch.nan)
        graph.replay()
        expected = layer.workload.expected_rows(0, fresh)
        assert expected is not None
        assert torch.equal(bits(output[:rows]), bits(expected)), rows


def _other_rows(layer: TunedLayer) -> TokenBatch:
    return TokenBatch(*(None if part is None else part[-128:].clone() for part in layer.received(600)))  # type: ignore[arg-type]
