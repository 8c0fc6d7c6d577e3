"""Block-scaled fp8."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distbench.workload import quantize as module
from distbench.workload.gaussian import hidden_states
from distbench.workload.quantize import dequantize, quantize_fp8_blocks, saturated

OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_quantised_rows_equal_their_golden_digests(device: str) -> None:
    parts = quantize_fp8_blocks(hidden_states(0, torch.arange(100, device=device), 256), OCP)
    content = b"".join(bytes(part.cpu().view(torch.uint8).flatten().tolist()) for part in parts)
    assert hashlib.sha256(content).hexdigest()[:16] == "f0bb2e96940b7ad6"


def test_each_block_has_its_own_scale() -> None:
    hidden = torch.zeros(2, 384, dtype=torch.bfloat16)
    hidden[0, 5], hidden[0, 130], hidden[1, 383] = -448.0, 1.75, 3.0
    quantized, scales = quantize_fp8_blocks(hidden, OCP)
    assert quantized.dtype == OCP
    assert scales.dtype == torch.float32
    assert scales.tolist() == [[1.0, 2.0**-8, 1.0], [1.0, 1.0, pytest.approx(3 / 448)]]
    assert float(quantized[0, 5].float()) == -448
    assert float(quantized[0, 130].float()) == 448
    assert float(quantized[1, 383].float()) == 448


def test_e4m3fnuz_has_larger_scales_and_a_single_zero() -> None:
    hidden = torch.zeros(1, 256, dtype=torch.bfloat16)
    hidden[0, :4] = torch.tensor([1.875, -1.0, -0.0, -(2.0**-19)])
    hidden[0, 128:131] = torch.tensor([480.0, -448.0, 300.0])
    quantized, scales = quantize_fp8_blocks(hidden, FNUZ)
    assert quantized.dtype == FNUZ
    assert scales.tolist() == [[2.0**-7, 2.0]]
    assert quantized.float()[0, :4].tolist() == [240.0, -128.0, 0.0, 0.0]
    assert quantized.view(torch.uint8)[0, 2:4].tolist() == [0, 0]
    assert quantized.float()[0, 128:131].tolist() == [240.0, -224.0, 144.0]


def test_too_large_values_saturate_and_nan_is_kept() -> None:
    values = torch.tensor([241.0, -300.0, 448.0, 1e9, float("-inf"), -0.0, float("nan")])
    for fp8, largest, zero in ((OCP, 448.0, 0x80), (FNUZ, 240.0, 0)):
        found = saturated(values, fp8)
        assert found.float()[2:5].tolist() == [largest, largest, -largest]
        assert found.view(torch.uint8)[5] == zero
        assert bool(found.float()[6].isnan())
    assert saturated(values[:2], FNUZ).float().tolist() == [240.0, -240.0]
    assert saturated(values[:2], OCP).float().tolist() == [240.0, -288.0]


@pytest.mark.parametrize("fp8", [OCP, FNUZ])
@given(seed=st.integers(0, 2**62), exponent=st.integers(-20, 20))
def test_quantisation_error_is_at_most_half_a_step(fp8: torch.dtype, seed: int, exponent: int) -> None:
    hidden = hidden_states(seed, torch.arange(3), 256) * 2.0**exponent
    quantized, scales = quantize_fp8_blocks(hidden, fp8)
    restored = dequantize(quantized, scales)
    steps = scales.repeat_interleave(128, dim=1)
    allowed = torch.maximum(hidden.float().abs() * 2.0**-4, steps * 2.0**-10) * 1.0001
    assert bool(((restored - hidden.float()).abs() <= allowed).all())


def test_quantisation_ties_round_to_even() -> None:
    hidden = torch.zeros(1, 128, dtype=torch.bfloat16)
    hidden[0, :4] = torch.tensor([448.0, 17.0, 19.0, -17.0])
    assert quantize_fp8_blocks(hidden, OCP)[0][0, :4].float().tolist() == [448.0, 16.0, 20.0, -16.0]


def test_quantisation_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = hidden_states(0, torch.arange(9), 256)
    whole = quantize_fp8_blocks(hidden, OCP)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 600)
    parts = quantize_fp8_blocks(hidden, OCP)
    assert torch.equal(whole[0].view(torch.uint8), parts[0].view(torch.uint8))
    assert torch.equal(whole[1], parts[1])


def test_dequantising_unscaled_rows_only_widens_them() -> None:
    hidden = hidden_states(0, torch.arange(2), 100)
    assert torch.equal(dequantize(hidden, None), hidden.float())


def test_quantisation_of_no_rows_is_empty() -> None:
    quantized, scales = quantize_fp8_blocks(torch.zeros(0, 256, dtype=torch.bfloat16), OCP)
    assert quantized.shape == (0, 256)
    assert scales.shape == (0, 2)
    assert dequantize(quantized, scales).shape == (0, 256)
