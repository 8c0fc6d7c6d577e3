"""Source, tensor maps and arguments of the kernels in CUDA C++; nothing is compiled or launched here."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from distbench.errors import Unsupported
from distbench.experts.triton import cluster_products
from distbench.experts.triton.cluster_products import Layer, Rows, layer_of, multiply, source
from distbench.experts.triton.config import Quant, cluster_config

SHARED_BYTES = 227 << 10
HIDDEN, INTER, LOCAL = 512, 256, 4


def made(quant: Quant) -> tuple[Tensor, Tensor]:
    dtype = torch.float8_e4m3fn if quant == "fp8" else torch.bfloat16
    return torch.zeros(LOCAL, 2 * INTER, HIDDEN).to(dtype), torch.zeros(LOCAL, HIDDEN, INTER).to(dtype)


@pytest.mark.parametrize("quant", ["bf16", "fp8"])
def test_layers_are_those_of_both_products(quant: Quant) -> None:
    size = 1 if quant == "fp8" else 2
    first, second = (layer_of(stage, matrix, cluster_config(quant), 256) for stage, matrix in enumerate(made(quant), 1))
    assert (first.columns, first.row_bytes) == (INTER, HIDDEN * size)
    assert (second.columns, second.row_bytes) == (HIDDEN, INTER * size)
    assert all(layer.shared_bytes <= SHARED_BYTES for layer in (first, second))


@pytest.mark.parametrize("fp8", [False, True])
def test_source_has_one_product_for_each_width_that_a_tile_may_have(fp8: bool) -> None:
    text = source(Layer(1, fp8, 256, 512, 16, 4, 112))
    widths = [16, 32, 48, *range(64, 113, 8)]
    assert [int(found) for found in re.findall(r"struct Product<(\d+)>", text)] == widths
    for width in widths:
        assert f"m64n{width}{'k32.f32.e4m3.e4m3' if fp8 else 'k16.f32.bf16.bf16'}" in text


class Launched:
    """Replacement of a compiled kernel that keeps the last arguments as bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.maps: list[tuple[Any, ...]] = []
        monkeypatch.setattr(cluster_products, "kernel", lambda *_: self)
        monkeypatch.setattr(cluster_products, "current_stream", lambda _: 3)
        monkeypatch.setattr(cluster_products, "tensor_map", self._map)

    def _map(self, *arguments: Any) -> bytes:
        self.maps.append(arguments[1:])
        return bytes(128)

    def launch(self, blocks: int, stream: int, arguments: tuple[Any, ...]) -> None:
        self.launch_of = blocks, stream, [ctypes.sizeof(one) for one in arguments]
        self.given = arguments[3]


def test_launch_pairs_the_processors_and_passes_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Launched(monkeypatch)
    weights, _ = made("fp8")
    layer = layer_of(1, weights, cluster_config("fp8"), 16)
    rows, output = torch.zeros(40, HIDDEN).to(weights.dtype), torch.zeros(40, INTER).to(weights.dtype)
    scales, out_scales, weight_scales = torch.zeros(HIDDEN // 128, 40), torch.zeros(INTER // 128, 40), torch.zeros(99)
    tables = torch.zeros(48, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    multiply(layer, Rows(rows, scales), weights, weight_scales, tables, None, Rows(output, out_scales), 131)
    assert launched.launch_of == (130, 3, [6 * 128, 8, 8, 40])
    assert launched.given.weight_scales == weight_scales.data_ptr()
    assert (launched.given.routing, launched.given.stride) == (None, 40)
    assert (launched.given.output, launched.given.output_scales) == (output.data_ptr(), out_scales.data_ptr())
    assert launched.maps[0] == (
        1,
        (HIDDEN, 8, 2, INTER // 16, 2 * LOCAL),
        (2 * HIDDEN, HIDDEN, 16 * HIDDEN, INTER * HIDDEN),
        (128, 8, 2, 8, 1),
        3,
    )
    assert launched.maps[5] == (4, (40, HIDDEN // 128), (160,), (116, 1))


def test_device_or_layer_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    monkeypatch.setattr(cluster_products, "check_cuda_bindings", lambda: None)
    monkeypatch.setattr(cluster_products, "is_hopper", lambda _: False)
    device = torch.device("cpu")
    with pytest.raises(Unsupported, match="some GPU is no Hopper"):
        cluster_products.check(512, 256, device)
    monkeypatch.setattr(cluster_products, "is_hopper", lambda _: True)
    cluster_products.check(512, 256, device)
    with pytest.raises(Unsupported, match="hidden_size = 128: must be a multiple of 256"):
        cluster_products.check(128, 256, device)
    with pytest.raises(Unsupported, match="intermediate_size = 64"):
        cluster_products.check(512, 64, device)
