"""What the experts of guests assume of the wheels of SGLang and vLLM: signatures, defaults and orders, by their text.

vLLM's wheel is large, so it is the one that DISTBENCH_VLLM_WHEEL names, of any release. SGLang's is the release that
has run; later ones take their settings in another way.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests import fake_guests
from tests.contract.facts.mori_facts import ours
from tests.contract.facts.source import signature
from tests.contract.wheels import function, sglang_wheel, tree
from tests.slim_wheel import VLLM_WHEEL, named

SGLANG = "0.5.13.post1"
TRITON_UTILS = "sglang/srt/layers/moe/moe_runner/triton_utils"
FUSED_MOE = "vllm/model_executor/layers/fused_moe"


@pytest.fixture(scope="module")
def sglang() -> Iterator[zipfile.ZipFile]:
    with sglang_wheel(SGLANG) as wheel:
        yield wheel


@pytest.fixture(scope="module")
def vllm() -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(named(VLLM_WHEEL)) as wheel:
        yield wheel


def method(wheel: zipfile.ZipFile, path: str, owner: str, name: str) -> ast.FunctionDef:
    found = next(node for node in tree(wheel, path).body if isinstance(node, ast.ClassDef) and node.name == owner)
    return next(node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == name)


def fits(called: dict[str, str], theirs: dict[str, str], exceptions: tuple[str, ...] = ()) -> None:
    """Hold that a fake's parameters are the package's, in its order, and that it lacks none without a default."""
    assert [name for name in theirs if name in called] == list(called)
    assert {name for name, default in theirs.items() if not default} <= called.keys() | set(exceptions)


def test_experts_of_sglang_have_the_parameters_of_the_fake(sglang: zipfile.ZipFile) -> None:
    theirs = signature(function(tree(sglang, f"{TRITON_UTILS}/fused_moe.py"), "fused_experts_impl"))
    fits(ours(fake_guests.fused_experts_impl), theirs)
    assert theirs["filter_expert"] == "True"
    tiles = function(tree(sglang, f"{TRITON_UTILS}/fused_moe_triton_config.py"), "try_get_optimal_moe_config")
    assert signature(tiles) == ours(fake_guests.sglang_tiles)


def test_sglang_adds_few_rows_by_torchs_compiler_and_two_routes_at_once(sglang: zipfile.ZipFile) -> None:
    body = ast.unparse(function(tree(sglang, f"{TRITON_UTILS}/fused_moe.py"), "_fused_moe_kernel_sequence"))
    assert "elif topk == 2 and routed_scaling_factor == 1.0:" in body
    assert "if num_tokens <= 32: moe_sum_reduce_torch_compile(" in " ".join(body.split())


def test_sglang_refuses_to_tell_settings_that_were_not_given(sglang: zipfile.ZipFile) -> None:
    module = tree(sglang, "sglang/srt/server_args.py")
    assert "raise ValueError(" in ast.unparse(function(module, "get_global_server_args"))
    assert list(signature(function(module, "set_global_server_args_for_scheduler"))) == ["server_args"]


@pytest.mark.parametrize("name", ["workspace_shapes", "apply"])
@pytest.mark.parametrize("kernel", ["TritonExperts", "DeepGemmExperts"])
def test_experts_of_vllm_have_the_parameters_of_the_fake(vllm: zipfile.ZipFile, kernel: str, name: str) -> None:
    file = {"TritonExperts": "triton_moe", "DeepGemmExperts": "deep_gemm_moe"}[kernel]
    theirs = signature(method(vllm, f"{FUSED_MOE}/experts/{file}.py", kernel, name))
    fake: Any = getattr(fake_guests.TritonExperts, name)
    assert theirs == ours(fake)


def test_layer_of_vllm_needs_no_more_than_the_adapter_gives(vllm: zipfile.ZipFile) -> None:
    body = next(
        node
        for node in tree(vllm, f"{FUSED_MOE}/config.py").body
        if isinstance(node, ast.ClassDef) and node.name == "FusedMoEConfig"
    ).body
    fields = {ast.unparse(node.target): node.value for node in body if isinstance(node, ast.AnnAssign)}
    given = set(fake_guests.Layer.__dataclass_fields__)
    if "intermediate_size" in fields:  # releases after 0.22 divide it among the ranks themselves
        given = given - {"intermediate_size_per_partition"} | {"intermediate_size"}
    assert given <= fields.keys()
    assert {name for name, default in fields.items() if default is None} <= given


def test_tiles_of_vllm_are_asked_for_as_they_are_defined(vllm: zipfile.ZipFile) -> None:
    tiles = function(tree(vllm, f"{FUSED_MOE}/fused_moe.py"), "try_get_optimal_moe_config")
    assert signature(tiles) == ours(fake_guests.try_get_optimal_moe_config)
    quant = signature(function(tree(vllm, f"{FUSED_MOE}/config.py"), "fp8_w8a8_moe_quant_config"))
    fits(ours(fake_guests.fp8_w8a8_moe_quant_config), quant)
