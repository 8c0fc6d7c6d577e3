"""The released aiter's selection and torch code, executed: the adapter's reading of its choices, and its results."""

from __future__ import annotations

import ast
import csv
import functools
import io
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from distbench.experts.aiter import emulated as stand_in
from distbench.experts.aiter.adapter import AiterExperts, make_aiter_experts
from distbench.experts.aiter.emulated import fused_moe as stand_in_moe
from distbench.experts.aiter.emulated import quirks
from distbench.experts.aiter.emulated.jit.utils import chip_info
from distbench.experts.aiter.emulated.utility import dtypes
from distbench.experts.aiter.package import STAND_IN, load_package
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.selection.heuristics import LayerKey
from distbench.experts.selection.releases import rules_for
from distbench.pipeline.inputs import workload_for
from distbench.tools.kernel_map import make_table_selector
from distbench.workload.quantize import fp8_dtype, quantize_fp8_blocks, quantize_weight_blocks, saturated
from tests.cases import tiny_case
from tests.contract.wheels import aiter_wheel, lifted, tree

VERSION = "0.1.7.post2.dev18"
SELECTING = ("nextPow2", "get_padded_M", "get_block_size_M", "get_2stage_cfgs")
COUNTS = (1, 17, 40, 100, 200, 500, 1024, 5000)


@pytest.fixture(scope="module")
def wheel() -> Iterator[zipfile.ZipFile]:
    with aiter_wheel(VERSION) as archive:
        yield archive


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = quirks.assumed()
    yield
    quirks.assume(before)


class Table:
    """The subset of pandas that the wheel's lookup uses: a CSV indexed by its key columns, numbers parsed."""

    def __init__(self, path: str) -> None:
        with Path(path).open(newline="") as lines:
            self._rows = [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(lines)]

    def set_index(self, names: list[str]) -> Table:
        self._names = names
        return self

    def to_dict(self, _: str) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {tuple(row[name] for name in self._names): row for row in self._rows}


def _number(text: str) -> Any:
    return int(text) if text.lstrip("-").isdigit() else text


class Anything:
    """Replacement of a module of kernels: each attribute is a distinct callable."""

    def __getattr__(self, name: str) -> Any:
        return partial(print, name)


@pytest.fixture
def selection(wheel: zipfile.ZipFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Factory of the wheel's selection functions for a number of compute units, over the wheel's own table."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(read_csv=Table))
    path = tmp_path / "tuned_fmoe.csv"
    path.write_bytes(wheel.read("aiter/configs/tuned_fmoe.csv"))
    moe = tree(wheel, "aiter/fused_moe.py")
    constants = [node for node in moe.body if "fused_moe_1stage_dict = " in ast.unparse(node)]
    names = ("fused_moe_1stage", "asm_stage1", "cktile_moe_stage1", "cktile_moe_stage2", "mp_lock", "get_asm_dir")

    def make(cu_count: int) -> SimpleNamespace:
        quirks.assume(quirks.Assumed(version=VERSION, cu_count=cu_count))
        types = {"fp8": dtypes.get_dtype_fp8(), "bf16": torch.bfloat16, "fp16": torch.float16, "i8": torch.int8}
        scope: dict[str, Any] = {name: getattr(Anything(), name) for name in names}
        scope |= {"AITER_CONFIG_FMOE_FILE": str(path), "cfg_2stages": None, "BLOCK_SIZE_M": 32, "PY": "", "bd_dir": ""}
        scope |= {"get_gfx": chip_info.get_gfx, "get_cu_num": chip_info.get_cu_num, "logger": stand_in.logger}
        scope |= {"dtypes": SimpleNamespace(fp4x2="fp4x2", i4x2="i4x2", **types), "aiter": Anything()}
        scope |= {"ActivationType": stand_in.ActivationType, "QuantType": stand_in.QuantType, "torch": torch}
        scope |= {"MOEMetadata": stand_in_moe.MOEMetadata, "functools": functools, "os": os}
        exec(compile(ast.Module(constants, []), "wheel", "exec"), scope)  # noqa: S102 - which types have one stage
        return SimpleNamespace(**lifted(wheel, "aiter/fused_moe.py", SELECTING, scope), make_table=path)

    return make


def tuned_layers(wheel: zipfile.ZipFile) -> dict[LayerKey, int]:
    """Layers of the wheel's table that a case can have, and the number of rows of each."""
    found: Counter[LayerKey] = Counter()
    for row in csv.DictReader(io.StringIO(wheel.read("aiter/configs/tuned_fmoe.csv").decode(), newline="")):
        quants: dict[str, Literal["bf16", "fp8"]] = {"QuantType.No": "bf16", "QuantType.per_1x128": "fp8"}
        plain = (row["act_type"], row["use_g1u1"], row["doweight_stage1"]) == ("ActivationType.Silu", "1", "0")
        if plain and row["q_type"] in quants:
            key = LayerKey(
                num_local_experts=int(row["expert"]),
                topk=int(row["topk"]),
                model_dim=int(row["model_dim"]),
                inter_dim=int(row["inter_dim"]),
                quant=quants[row["q_type"]],
                cu_count=int(row["cu_num"]),
            )
            found[key] += 1
    return found


def test_choice_read_by_the_adapter_equals_the_selectors_over_the_wheels_table(
    wheel: zipfile.ZipFile, selection: Any
) -> None:
    """The wheel's lookup is executed, so its stages must carry kernel names where the adapter reads them."""
    rules, tuned = rules_for(VERSION), 0
    layers = tuned_layers(wheel)
    for layer, rows in layers.items():
        shape: dict[str, Any] = {"hidden_size": layer.model_dim, "intermediate_size": layer.inter_dim}
        shape |= {"num_experts": layer.num_local_experts, "topk": layer.topk, "dispatch_dtype": layer.quant}
        moe = selection(layer.cu_count)
        selector = make_table_selector(layer, rules, [str(moe.make_table)])
        package = load_package(STAND_IN)._replace(version=VERSION, moe=moe)
        case = tiny_case(1, experts="aiter", emulate=True, cu_count=layer.cu_count, **shape)
        experts = AiterExperts(case, package)
        found = [experts.selection(count) for count in COUNTS]
        assert found == [selector.choose(count) for count in COUNTS]
        answered = {choice.bucket for choice in found if choice.source == "tuned"}
        assert answered == {row.bucket for row in selector.tuned} & {choice.bucket for choice in found}
        assert len(selector.tuned) == rows
        tuned += len(answered)
    assert len(layers) > 10
    assert tuned > 90


def quantised(
    wheel: zipfile.ZipFile, given: tuple[torch.Tensor, torch.Tensor], weights: tuple[torch.Tensor, ...], routing: Any
) -> torch.Tensor:
    """Compute with the wheel's own two stages, the activation between them quantised by per_1x128."""
    names = ("get_inter_dim", "torch_moe_stage1", "torch_moe_stage2")
    types = SimpleNamespace(fp32=torch.float32, fp16=torch.float16)
    scope: dict[str, Any] = {
        "dtypes": types,
        "ActivationType": stand_in.ActivationType,
        "QuantType": stand_in.QuantType,
    }
    scope |= {"aiter": SimpleNamespace(get_torch_act=lambda _: torch.nn.functional.silu)}
    scope |= {"quant_remap": stand_in_moe.quant_remap}
    stages = lifted(wheel, "aiter/fused_moe.py", names, scope)
    kind, (routed, ids) = stand_in.QuantType.per_128x128, routing
    w1, w2, scale1, scale2 = weights
    middle = stages["torch_moe_stage1"](
        given[0], w1, w2, routed, ids, dtype=torch.bfloat16, quant_type=kind, a1_scale=given[1], w1_scale=scale1
    )
    narrow, scales = quantize_fp8_blocks(middle.flatten(0, -2), w2.dtype)
    result: torch.Tensor = stages["torch_moe_stage2"](
        narrow.view(middle.shape),
        w1,
        w2,
        routed,
        ids,
        dtype=torch.bfloat16,
        quant_type=kind,
        w2_scale=scale2,
        a2_scale=scales,
    )
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 40, 300, 0])
@pytest.mark.parametrize("cu_count", [256, 304])
def test_fp8_results_equal_those_of_the_wheels_torch_code(
    wheel: zipfile.ZipFile, seed: int, rows: int, cu_count: int
) -> None:
    """`rows` = 0 selects the rows of an exact workload, which must give the same bits."""
    case = tiny_case(4, experts="aiter", emulate=True, dispatch_dtype="fp8", cu_count=cu_count, seed=seed)
    mask = torch.zeros(16, dtype=torch.int32)
    mask[4:8] = 1
    if rows:
        generator = torch.Generator().manual_seed(seed)
        wide = torch.randn(rows, 256, generator=generator)
        weights = torch.rand(rows, 4, generator=generator)
        ids = torch.rand(rows, 16, generator=generator).argsort(1)[:, :4].int().contiguous()
        scales = torch.exp2(torch.randint(-7, -4, (rows, 2), generator=generator).float())
        hidden = (wide.view(rows, 2, 128) / scales.unsqueeze(2)).view(rows, 256)
        hidden = saturated(hidden, fp8_dtype(case.fp8_format))
        by_block = torch.tensor([1.0, 4.0]).repeat_interleave(128)
        w1 = (torch.randn(4, 256, 256, generator=generator) / 40 * by_block).bfloat16()
        w2 = (torch.randn(4, 256, 128, generator=generator) / 11).bfloat16()
    else:
        workload = workload_for(case, torch.device("cpu"))
        batch = workload.tokens(0)
        assert batch.scales is not None
        hidden, scales, weights, ids = batch.hidden, batch.scales, batch.weights, batch.ids
        w1, w2 = workload.local_weights(1)
    live = torch.tensor([hidden.shape[0]], dtype=torch.int32)
    given = ExpertInput(hidden, scales, weights, ids, live)
    ours = make_aiter_experts(case)(given, ExpertWeights(w1, w2, mask))
    (narrow1, scale1), (narrow2, scale2) = (
        quantize_weight_blocks(w1, hidden.dtype),
        quantize_weight_blocks(w2, hidden.dtype),
    )
    local = torch.where((ids >= 4) & (ids < 8), ids - 4, -1)
    theirs = quantised(wheel, (hidden, scales), (narrow1, narrow2, scale1, scale2), (weights, local))
    if rows:
        # One stage quantises what theirs rounds to bf16 before: 3 % of its elements are a step of e4m3 away.
        assert float((ours.float() - theirs.float()).norm()) <= 2.0**-6 * float(theirs.float().norm())
    else:
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
        assert bool(theirs.any())
