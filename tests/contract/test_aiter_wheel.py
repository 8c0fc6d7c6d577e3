"""Our selection rules against the released aiter 0.1.7.post2.dev18: its own functions, tables and tile lists.

The wheel is read, never imported: importing aiter needs a HIP toolchain.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.experts.selection import heuristics
from distbench.experts.selection.choice import (
    KernelSelector,
    LayerKey,
    TunedKey,
    padded_rows,
    parse_tuned_rows,
    rules_for,
)
from distbench.experts.selection.kernel_names import DEFAULT_TILE_K, stage2_mode, tile_k
from tests.contract.wheels import aiter_wheel

VERSION = "0.1.7.post2.dev18"
WHEEL = f"amd_aiter-{VERSION}-py3-none-any.whl"
RULES = rules_for(VERSION)
CU_COUNTS = (304, 256, 80)
SHAPES = ((32, 8, 2048), (33, 9, 2048), (256, 8, 256), (16, 2, 1024), (4, 4, 128), (8, 1, 192), (128, 8, 384))


class _Named:
    """Replacement of any module or enum: each attribute is its own dotted name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> str:
        return f"{self._name}.{attribute}"


@pytest.fixture(scope="module")
def wheel() -> Iterator[zipfile.ZipFile]:
    with aiter_wheel(VERSION) as archive:
        yield archive


@pytest.fixture(scope="module")
def source(wheel: zipfile.ZipFile) -> ast.Module:
    return ast.parse(wheel.read("aiter/fused_moe.py"))


def _run(nodes: list[ast.stmt], namespace: dict[str, Any]) -> None:
    exec(compile(ast.Module(nodes, []), WHEEL, "exec"), namespace)  # noqa: S102 - a release's own pure functions


def _function(source: ast.Module, name: str, namespace: dict[str, Any]) -> Callable[..., int]:
    node = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == name)
    node.decorator_list = []
    _run([node], namespace)
    function: Callable[..., int] = namespace[name]
    return function


def _default_choice(source: ast.Module, bucket: int, layer: LayerKey) -> tuple[bool, int, int]:
    """Run the branch of get_2stage_cfgs without a tuned row: whether one stage, block_m, ksplit."""
    body = next(
        node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "get_2stage_cfgs"
    ).body
    branch = next(node for node in body if ast.unparse(node).startswith("if cfg is None:\n    ksplit = 0"))
    assert isinstance(branch, ast.If)
    table = next(node for node in source.body if "fused_moe_1stage_dict = " in ast.unparse(node))
    namespace: dict[str, Any] = {name: _Named(name) for name in ("ActivationType", "QuantType", "dtypes", "aiter")}
    namespace |= {"token": bucket, "topk": layer.topk, "expert": layer.num_local_experts, "inter_dim": layer.inter_dim}
    namespace |= {"get_gfx": lambda: layer.arch, "get_cu_num": lambda: layer.cu_count, "BLOCK_SIZE_M": 32}
    namespace |= {"activation": "ActivationType.Silu", "dtype": "dtypes.bf16", "use_g1u1": True}
    namespace |= {"q_type": "QuantType.No" if layer.quant == "bf16" else "QuantType.per_1x128"}
    namespace |= {"q_dtype_a": f"dtypes.{layer.quant}", "q_dtype_w": f"dtypes.{layer.quant}", "doweight_stage1": False}
    _function(source, "get_block_size_M", namespace)
    _run([table], namespace)
    _run(branch.body, namespace)
    return namespace["run_1stage"], namespace["block_m"], namespace["ksplit"]


def test_bucket_of_every_row_count_equals_the_wheels(source: ast.Module) -> None:
    namespace: dict[str, Any] = {}
    _function(source, "nextPow2", namespace)
    theirs = _function(source, "get_padded_M", namespace)
    wrong = [rows for rows in range(200_001) if padded_rows(rows, RULES) != theirs(rows)]
    assert wrong == []


@pytest.mark.parametrize("cu_count", CU_COUNTS)
def test_block_size_of_every_row_count_equals_the_wheels(source: ast.Module, cu_count: int) -> None:
    theirs = _function(source, "get_block_size_M", {"get_cu_num": lambda: cu_count})
    for experts, topk, inter in SHAPES:
        key = LayerKey(num_local_experts=experts, topk=topk, model_dim=7168, inter_dim=inter, cu_count=cu_count)
        counts = [1 << power for power in range(18)] + [rows * 769 for rows in range(1, 260)]
        for rows in range(200_001) if experts == SHAPES[0][0] and cu_count == CU_COUNTS[0] else counts:
            assert heuristics.block_rows(rows, key, RULES) == theirs(rows, topk, experts, inter), (rows, key)


@pytest.mark.parametrize("quant", ["bf16", "fp8"])
@pytest.mark.parametrize("cu_count", CU_COUNTS)
def test_heuristic_choice_without_a_tuned_row_equals_the_wheels(
    source: ast.Module, quant: Literal["bf16", "fp8"], cu_count: int
) -> None:
    for experts, topk, inter in SHAPES:
        key = LayerKey(
            num_local_experts=experts, topk=topk, model_dim=7168, inter_dim=inter, quant=quant, cu_count=cu_count
        )
        for bucket in (16, 32, 64, 128, 256, 512, 1024):
            ours = KernelSelector(layer=key, rules=RULES).choose(bucket)
            assert (ours.run_1stage, ours.block_m, ours.ksplit) == _default_choice(source, bucket, key), (bucket, key)


def test_ck_tile_lists_equal_the_wheels(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("aiter_meta/csrc/ck_gemm_moe_2stages_codegen/gen_instances.py").decode()
    lists = dict(re.findall(r'^(A\w+_heuristic_dispatch) = """(.*?)"""', text, re.DOTALL | re.MULTILINE))
    for gfx, suffix in (("gfx942", ""), ("gfx950", "_gfx950")):
        for stage in (1, 2):
            tiles = _tiles(lists[f"A16W16_A8W8_gemm{stage}{suffix}_heuristic_dispatch"])
            for inter in (128, 192, 256, 2048):
                key = LayerKey(num_local_experts=32, topk=8, model_dim=7168, inter_dim=inter, gfx=gfx)
                for block_m in (32, 64, 128):
                    columns, k, pipeline = tiles[block_m]
                    name = f"ck_2stages_gemm{stage}_bm{block_m}_n{columns}_k{k}_v{pipeline}"
                    assert heuristics.default_stage(stage, block_m, key, RULES) == (name, k)


def _tiles(text: str) -> dict[int, tuple[int, int, int]]:
    """Read rows → (columns, K, pipeline) of two-byte elements out of a dispatch list."""
    found = re.findall(r"V(\d), 256, (\d+), (\d+), (\d+)/sizeof", text)
    return {int(rows): (int(columns), int(size) // 2, int(pipeline)) for pipeline, rows, columns, size in found}


@pytest.fixture(scope="module")
def table(wheel: zipfile.ZipFile) -> bytes:
    return wheel.read("aiter/configs/tuned_fmoe.csv")


def test_every_row_of_the_wheels_tuned_table_is_parsed(table: bytes) -> None:
    lines = list(csv.DictReader(io.StringIO(table.decode(), newline="")))
    keys = {_key(line) for line in lines}
    read = [(key, row) for key in keys for row in parse_tuned_rows(table, "wheel", key)]
    assert len(read) == len(lines) == 773
    by_key = {(_key(line), int(line["token"])): line for line in lines}
    for key, row in read:
        line = by_key[key, row.bucket]
        assert (str(row.block_m), str(row.ksplit), row.kernel_name1) == (
            line["block_m"],
            line["ksplit"],
            line["kernelName1"],
        )
        assert row.us == float(line["us"])
        assert row.run_1stage == (line["run_1stage"] != "0")


def _key(line: dict[str, str]) -> TunedKey:
    names = {field.name: field.type for field in msgspec.structs.fields(TunedKey) if field.name != "gfx"}
    return msgspec.convert({name: line[name] for name in names}, TunedKey, strict=False)


def test_every_kernel_name_of_the_wheels_tuned_table_is_parsed(table: bytes) -> None:
    names = set(re.findall(rb"moe_ck2stages\w+|_ZN5aiter\w+", table))
    assert len(names) > 50
    for name in (name.decode() for name in names):
        sizes = re.search(r"_(\d+)x(\d+)x(\d+)x(\d+)_", name)
        assert tile_k(name) == (int(sizes[4]) if sizes else DEFAULT_TILE_K)
        assert sizes is not None or name.startswith("_ZN5aiter")
        assert stage2_mode(name) == "atomic"


def test_lookup_in_the_wheels_table_depends_on_the_activation(table: bytes) -> None:
    layer = LayerKey(num_local_experts=128, topk=8, model_dim=4096, inter_dim=384, cu_count=256)
    with_act = TunedKey.for_layer(layer, RULES)
    assert with_act.act_type == "ActivationType.Silu"
    silu = parse_tuned_rows(table, "wheel", with_act)
    gelu = parse_tuned_rows(table, "wheel", msgspec.structs.replace(with_act, act_type="ActivationType.Gelu"))
    assert {row.bucket for row in silu} == {16, 32, 64, 128, 256, 512, 1024}
    assert "_silu_" in silu[0].kernel_name1
    assert "_gelu_" in gelu[0].kernel_name1


def test_truncated_tuned_table_is_refused_with_its_line(table: bytes) -> None:
    layer = LayerKey(num_local_experts=128, topk=8, model_dim=4096, inter_dim=384, cu_count=256)
    with pytest.raises(InvalidCase, match="line 774: column"):
        parse_tuned_rows(table[: table.rindex(b"ActivationType")], "wheel", TunedKey.for_layer(layer, RULES))


def test_kernels_command_maps_the_wheels_own_table(
    table: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tuned_fmoe.csv"
    path.write_bytes(table)
    shape = ["--model=qwen3-235b-a22b", "--intermediate-size=384", "--ep-size=1", "--cu-count=256"]
    assert main(["kernels", *shape, f"--aiter-version={VERSION}", f"--kernel-table={path}", "--format=json"]) == 0
    spans = json.loads(capsys.readouterr().out)["spans"]
    assert [span["bucket"] for span in spans] == [16, 32, 64, 128, 256, 512, 1024]
    assert {span["source"] for span in spans} == {"tuned"}
    assert all(span["us"] > 0 and "ck2stages" in span["stage1"] for span in spans)
    assert [span["limit_here"] for span in spans][-2:] == ["other kernel", "same kernel"]


def test_ck_kernels_raise_unless_the_layer_is_a_multiple_of_the_tile(wheel: zipfile.ZipFile) -> None:
    codegen = "aiter_meta/csrc/ck_gemm_moe_2stages_codegen/gemm_moe_ck2stages_common"
    ck = "aiter_meta/3rdparty/composable_kernel/include/ck/tensor_operation/gpu/device/impl/device_moe_gemm"
    for kind in ("", "_blockscale"):
        device = wheel.read(f"{ck}{kind}.hpp").decode()
        assert "if(arg.N % NPerBlock != 0 || arg.K % KPerBlock != 0)\n        {\n            return false;" in device
        caller = wheel.read(f"{codegen}{kind}.cuh").decode()
        assert caller.count("GemmSpecialization::Default;") == caller.count("IsSupportedArgument(argument)") == 2
        assert caller.count('"not support this GEMM problem"') == 2
