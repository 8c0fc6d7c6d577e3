"""Work that the Triton experts do once: fp8 weights per version of the bf16 weights, kernels per node."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch
from torch import Tensor

from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.triton import adapter
from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import ConfigSelector, LayerShape

SHAPE = LayerShape(num_experts=4, num_local_experts=2, hidden_size=128, intermediate_size=128, topk=2, quant="fp8")


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> TritonExperts:
    monkeypatch.setattr(adapter, "_check_triton", lambda: None)
    return TritonExperts(ConfigSelector(shape=SHAPE))


def weights(value: float) -> tuple[Tensor, Tensor]:
    return torch.full((2, 256, 128), value).bfloat16(), torch.full((2, 128, 128), value).bfloat16()


def test_fp8_weights_are_quantised_once_per_weights_in_inference_mode(experts: TritonExperts) -> None:
    with torch.inference_mode():
        first, second = weights(1.0), weights(2.0)
        made = experts.quantized(*first)
        assert experts.quantized(*first) is made
        scales = experts.quantized(*second)[2]
    assert torch.equal(scales, 2 * made[2])


def test_modified_weights_are_quantised_again(experts: TritonExperts) -> None:
    first, second = weights(1.0)
    made = experts.quantized(first, second)
    first.mul_(2)
    assert torch.equal(experts.quantized(first, second)[2], 2 * made[2])


class Compiled:
    """Replacement of one rank's kernels that records the rows, live rows and types of each call."""

    def __init__(self, experts: TritonExperts, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int, torch.dtype, bool]] = []
        monkeypatch.setattr(experts, "run", self)

    def __call__(self, _: object, given: ExpertInput, __: ExpertWeights) -> Tensor:
        self.calls.append((given.rows, int(given.num_local_tokens), given.hidden.dtype, given.scales is not None))
        return given.hidden


@pytest.mark.parametrize("quant", ["bf16", "fp8"])
def test_one_rank_per_node_compiles_each_row_count(
    quant: Literal["bf16", "fp8"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_check_triton", lambda: None)
    monkeypatch.setattr(adapter, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(adapter, "_build_name", lambda _: "a device")
    shape = msgspec.structs.replace(SHAPE, quant=quant)
    ranks = [TritonExperts(ConfigSelector(shape=shape)) for _ in range(2)]
    compiled = [Compiled(rank, monkeypatch) for rank in ranks]
    held = ExpertWeights(*weights(1.0), torch.ones(4, dtype=torch.int32))
    for rank in ranks:
        rank.warm_up(held, (512, 64, 64))
    dtype = torch.float8_e4m3fn if quant == "fp8" else torch.bfloat16
    assert compiled[0].calls == [(64, 0, dtype, quant == "fp8"), (512, 0, dtype, quant == "fp8")]
    assert compiled[1].calls == []
    ranks[1].warm_up(held, (128,))
    assert [rows for rows, *_ in compiled[1].calls] == [128]


def test_warm_up_compiles_nothing_in_the_interpreter(experts: TritonExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(adapter, "_cache_folder", lambda: pytest.fail("compiles"))
    experts.warm_up(ExpertWeights(*weights(1.0), torch.ones(4, dtype=torch.int32)), (64,))
