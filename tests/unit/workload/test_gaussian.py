"""Gaussian inputs: their distribution, their bits, and the reference."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.base import ExpertWeights
from distbench.experts.roundings import Roundings
from distbench.verify.ideal import ideal_rows
from distbench.workload import gaussian
from distbench.workload.gaussian import dense_weights, hidden_states, routing_weights
from distbench.workload.inputs import make_workload

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def check_normal(values: Tensor, deviation: float) -> None:
    wide = values.double().flatten() / deviation
    tolerance = 6 / wide.numel() ** 0.5
    assert abs(float(wide.mean())) < tolerance
    assert abs(float(wide.std()) - 1) < tolerance + 2**-8
    # Four uniform numbers have an excess kurtosis of -0.3.
    assert abs(float((wide**4).mean()) - 2.7) < 0.1
    assert float(wide.abs().max()) < 3.5


def test_gaussian_tensors_have_the_documented_distributions() -> None:
    check_normal(hidden_states(0, torch.arange(1000), 1000), 1)
    w1, w2 = dense_weights(320, 96, 0, torch.tensor([3, 9]))
    assert w1.shape == (2, 192, 320)
    assert w2.shape == (2, 320, 96)
    assert w1.dtype == w2.dtype == torch.bfloat16
    check_normal(w1, 320**-0.5)
    check_normal(w2, 96**-0.5)


def test_rows_are_as_distinct_as_independently_drawn_ones() -> None:
    w1, w2 = dense_weights(256, 128, 0, torch.arange(16))
    for rows in (w1.view(-1, 256), w2.view(-1, 128)):
        assert len(torch.unique(rows.view(torch.int16), dim=0)) == len(rows)
        for wide in (rows.double(), rows.double().t()):
            alike = functional.normalize(wide, dim=1) @ functional.normalize(wide, dim=1).t()
            alike.fill_diagonal_(0)
            alike *= wide.shape[1] ** 0.5  # of standard deviation 1 where values are independent
            assert abs(float(alike.square().mean().sqrt()) - 1) < 0.03
            assert float(alike.abs().max()) < 6.5


def test_rows_of_two_seeds_are_as_distinct_as_independent_rows() -> None:
    first, second = (dense_weights(256, 128, seed, torch.arange(4)) for seed in (0, 1))
    for left, right in zip(first, second, strict=True):
        both = torch.cat([left, right]).view(-1, left.shape[2])
        assert len(torch.unique(both.view(torch.int16), dim=0)) == len(both)
        wide = functional.normalize(both.double(), dim=1)
        alike = (wide @ wide.t()).fill_diagonal_(0) * both.shape[1] ** 0.5
        assert abs(float(alike.square().mean().sqrt()) - 1) < 0.03
        assert float(alike.abs().max()) < 6.5


def test_scaling_is_exact_before_the_single_rounding() -> None:
    sums = torch.arange(-510, 511)
    for fan_in in (1, 96, 320, 768, 2048, 7168, 14336):
        scale = gaussian._short_scale(1 / (gaussian._DEVIATION * fan_in**0.5))  # noqa: SLF001 - the claim is about it
        assert torch.equal((sums.float() * scale).double(), sums.double() * scale)


def test_routing_weights_are_positive_and_sum_to_one() -> None:
    weights = routing_weights(0, torch.arange(2000), 8)
    assert weights.dtype == torch.float32
    assert float(weights.min()) > 0
    sums = weights.double().sum(1)
    assert float(sums.max()) <= 1
    assert float(sums.min()) > 1 - 8 * 2.0**-20
    assert float(weights.std()) > 0.02


def test_gaussian_weights_of_any_slice_equal_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dense_weights(64, 32, 1, torch.arange(6))
    monkeypatch.setattr(gaussian, "_CHUNK_ELEMENTS", 1000)
    part = dense_weights(64, 32, 1, torch.tensor([4, 1]))
    assert all(torch.equal(some, every[[4, 1]]) for some, every in zip(part, whole, strict=True))
    assert torch.equal(hidden_states(1, torch.arange(30), 64)[[7, 2]], hidden_states(1, torch.tensor([7, 2]), 64))


@pytest.mark.parametrize("device", DEVICES)
def test_gaussian_tensors_equal_their_golden_digests(device: str) -> None:
    keys, experts = torch.arange(20, device=device), torch.tensor([1, 5], device=device)
    made = [hidden_states(9, keys, 100), routing_weights(9, keys, 6), *dense_weights(48, 80, 9, experts)]
    content = b"".join(bytes(part.cpu().view(torch.uint8).flatten().tolist()) for part in made)
    assert hashlib.sha256(content).hexdigest()[:16] == "74c9655f5d949cce"


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_float64_rows_of_all_ranks_add_up_to_the_layer(dtype: str) -> None:
    workload = make_workload(
        numerics="gaussian",
        hidden_size=256,
        intermediate_size=96,
        num_experts=8,
        topk=3,
        ep_size=2,
        seed=4,
        routing="uniform",
        tokens_per_rank=(5, 9),
        dispatch_dtype="fp8" if dtype == "fp8" else "bf16",
        device="cpu",
    )
    batch = workload.tokens(1, torch.tensor([0, 2, 4, 6]))
    reference = torch.zeros(4, 256)
    for rank in range(2):
        mask = torch.arange(8).div(4, rounding_mode="floor").eq(rank).int()
        weights = ExpertWeights(*workload.local_weights(rank), mask)
        reference += ideal_rows(batch, weights, [Roundings()])[0]
    hidden = batch.hidden.double()
    if batch.scales is not None:
        hidden = (hidden.view(4, 2, 128) * batch.scales.double().unsqueeze(2)).view(4, 256)
    wanted = torch.zeros(4, 256, dtype=torch.float64)
    for expert in range(8):
        w1, w2 = (part[expert % 4].double() for part in workload.local_weights(expert // 4))
        gate, up = (hidden @ w1.t()).chunk(2, dim=1)
        share = ((batch.ids == expert) * batch.weights).double().sum(1, keepdim=True)
        wanted += (functional.silu(gate) * up) @ w2.t() * share
    torch.testing.assert_close(reference, wanted.float())
    assert workload.expected(batch) is None
    assert workload.expected_rows(0, batch) is None
