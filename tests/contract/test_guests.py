"""What the guests assume of the wheels of sgl-deep-ep, SGLang and vLLM: signatures, defaults and orders, by their text.

vLLM's wheel is large, so it is the one that DISTBENCH_VLLM_WHEEL names, of any release. SGLang's is the last release
whose experts take their settings as the adapter gives them.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest

from distbench.transport.deepep.normal import _Handle
from tests import fake_guests
from tests.contract.facts.mori_facts import ours
from tests.contract.facts.source import signature
from tests.contract.wheels import deep_ep_wheel, function, sglang_wheel, tree
from tests.slim_wheel import VLLM_WHEEL, named

SGLANG = "0.5.13.post1"
LEGACY = "deep_ep/buffers/legacy.py"
TRITON_UTILS = "sglang/srt/layers/moe/moe_runner/triton_utils"
FUSED_MOE = "vllm/model_executor/layers/fused_moe"


@pytest.fixture(scope="module")
def deep_ep() -> Iterator[zipfile.ZipFile]:
    with deep_ep_wheel() as wheel:
        yield wheel


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


def text(wheel: zipfile.ZipFile, name: str) -> str:
    return " ".join(ast.unparse(method(wheel, LEGACY, "Buffer", name)).split())


def fits(called: dict[str, str], theirs: dict[str, str], exceptions: tuple[str, ...] = ()) -> None:
    """Hold that a fake's parameters are the package's, in its order, and that it lacks none without a default."""
    assert [name for name in theirs if name in called] == list(called)
    assert {name for name, default in theirs.items() if not default} <= called.keys() | set(exceptions)


@pytest.mark.parametrize(
    ("name", "returned"),
    [
        (
            "get_dispatch_layout",
            "return (num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank, ",
        ),
        ("dispatch", "recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, EventOverlap(event))"),
        ("combine", "return (recv_x, recv_topk_weights, EventOverlap(event))"),
        ("low_latency_dispatch", "return (packed_recv_x, packed_recv_count, handle, EventOverlap("),
        ("low_latency_combine", "return (combined_x, EventOverlap("),
    ],
)
def test_returns_of_deep_ep_have_the_order_that_the_transport_takes_them_in(
    deep_ep: zipfile.ZipFile, name: str, returned: str
) -> None:
    assert returned in text(deep_ep, name)


def test_handles_of_deep_ep_have_the_fields_that_sources_are_read_from(deep_ep: zipfile.ZipFile) -> None:
    packed = "handle = (rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx, "
    assert packed + "is_token_in_rank, send_head)" in text(deep_ep, "dispatch")
    assert len(_Handle._fields) == 6
    assert "handle = (packed_recv_src_info, packed_recv_layout_range, " in text(deep_ep, "low_latency_dispatch")


def test_arguments_by_which_the_transport_calls_deep_ep_exist(deep_ep: zipfile.ZipFile) -> None:
    given = {
        "__init__": {"low_latency_mode", "num_qps_per_rank", "explicitly_destroy"},
        "dispatch": {"num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank", "num_tokens_per_expert"},
        "low_latency_dispatch": {"use_fp8", "async_finish", "return_recv_hook"},
        "low_latency_combine": {"use_logfmt", "zero_copy", "async_finish", "return_recv_hook"},
    }
    for name, keywords in given.items():
        assert keywords <= signature(method(deep_ep, LEGACY, "Buffer", name)).keys()
    parameters = list(signature(method(deep_ep, LEGACY, "Buffer", "__init__")))
    assert parameters[:3] == ["group", "num_nvl_bytes", "num_rdma_bytes"]
    parameters = list(signature(method(deep_ep, LEGACY, "Buffer", "low_latency_dispatch")))
    assert parameters[:4] == ["x", "topk_idx", "num_max_dispatch_tokens_per_rank", "num_experts"]
    parameters = list(signature(method(deep_ep, LEGACY, "Buffer", "low_latency_combine")))
    assert parameters[:4] == ["x", "topk_idx", "topk_weights", "handle"]


def test_bounds_of_deep_ep_are_those_that_the_transport_states(deep_ep: zipfile.ZipFile) -> None:
    depth = "assert self.nvshmem_qp_depth >= (num_max_dispatch_tokens_per_rank + 1) * 2"
    assert depth in text(deep_ep, "low_latency_dispatch")
    assert "os.environ.get('NVSHMEM_QP_DEPTH', '1024')" in text(deep_ep, "__init__")
    configs = [text(deep_ep, f"get_{stage}_config") for stage in ("dispatch", "combine")]
    for one in configs:
        assert "config_map = {2: " in one
        assert "assert num_ranks in config_map, f'Unsupported number of EP ranks: {num_ranks}'" in one


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
