"""The Triton experts' float8 weights: made once for as long as the bf16 ones stay the same, in inference mode too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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


def test_in_inference_mode_they_are_made_once_for_the_same_weights(experts: TritonExperts) -> None:
    with torch.inference_mode():
        first, second = weights(1.0), weights(2.0)
        made = experts.quantized(*first)
        assert experts.quantized(*first) is made
        scales = experts.quantized(*second)[2]
    assert torch.equal(scales, 2 * made[2])


def test_weights_that_were_written_to_are_quantised_anew(experts: TritonExperts) -> None:
    first, second = weights(1.0)
    made = experts.quantized(first, second)
    first.mul_(2)
    assert torch.equal(experts.quantized(first, second)[2], 2 * made[2])
