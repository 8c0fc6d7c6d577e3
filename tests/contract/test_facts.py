"""Every fact that distbench assumes matches the pinned releases, and no longer matches a copy with the fact changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from distbench.callers.sglang.definitions import DEFINITIONS as OF_SGLANG
from distbench.callers.vllm.definitions import DEFINITIONS as OF_VLLM
from distbench.case.sglang_env import recorded_environment
from distbench.case.sglang_releases import VARIABLES
from tests.contract.facts import FACTS
from tests.contract.facts import aiter_facts as of_aiter
from tests.contract.facts import deep_ep_facts as of_deep_ep
from tests.contract.facts import mori_facts as mori
from tests.contract.facts import sglang_facts as sglang
from tests.contract.facts import vllm_facts as vllm
from tests.contract.facts.constructor_facts import CONSTRUCTOR
from tests.contract.facts.fact import Fact, check
from tests.contract.facts.fetch import AITER, DEEP_EP, MORI, NIGHTLY, SGLANG, VLLM, Distribution, Unreachable, pinned
from tests.contract.facts.source import Source

OLDER = "0.5.20"
RELEASES: dict[str, tuple[Distribution, str]] = {
    "mori": (MORI, ""),
    "mori, nightly": (NIGHTLY, ""),
    "sglang": (SGLANG, ""),
    "aiter": (AITER, ""),
    "vllm": (VLLM, ""),
    "deep_ep": (DEEP_EP, ""),
}
VLLM_WHEEL = os.environ.get("DISTBENCH_VLLM_WHEEL", "")
INTERNODE = f"{mori.KERNELS}/internode_v1.cpp"
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "parameters of the operator's methods": (mori.OPERATOR, "call_reset: bool = False", "call_reset: bool = True"),
    "fields and defaults of the configuration": (mori.OPERATOR, "num_qp_per_pe: int = 1", "num_qp_per_pe: int = 2"),
    "parameters of shmem's functions": ("mori/shmem/api.py", "def shmem_mype()", "def shmem_mype(team=0)"),
    "names that mori.ops exports": ("mori/ops/__init__.py", "EpDispatchCombineOp,", "EpDispatchCombineOp as Op,"),
    "kernel types and their numbers": (mori.HEADER, "AsyncLL = 4", "AsyncLL = 6"),
    "words for the combine's quantisation": (mori.OPERATOR, '"fp8_direct_cast": Ep', '"fp8_cast": Ep'),
    "kernel module of each kernel type": (mori.OPERATOR, '"ep_async_ll"', '"ep_async"'),
    "rows of the receive buffer": (mori.HEADER, "return worldSize * MaxNumTokensToRecvPerRank();", "return 0;"),
    "buffers of each kernel type": (
        CONSTRUCTOR,
        "bufs.staging = MallocSymm(stagingSize",
        "x = MallocSymm(stagingSize",
    ),
    "bytes of the symmetric heap": (CONSTRUCTOR, "(2 * nNodes)", "(3 * nNodes)"),
    "variables that the constructor refuses": (CONSTRUCTOR, '"MORI_ENABLE_RAIL_ONLY is set', '"MORI_RAIL is set'),
    "kernel types that the constructor refuses": (
        CONSTRUCTOR,
        "config.kernelType == KernelType::AsyncLL)) {",
        "false)) {",
    ),
    "overflow asserted in dispatch": (INTERNODE, "Total recv token overflow", "Overflow"),
    "barriers of the constructor": (mori.OPERATOR, "dist.barrier()", "dist.wait()"),
    "guards of the operator": (mori.OPERATOR, "self._check_combine_indices(indices, cur_n)", "pass"),
    "IntraNodeLL looks at eight slots": (
        f"{mori.KERNELS}/intranode_ll.hpp",
        "k < kMaxGpusPerNode; ++k",
        "k < topk; ++k",
    ),
    "fp8 types of the kernels": (mori.OPERATOR, '= "fp8_ocp"', '= "fp8"'),
    "largest fp8 of a quantised combine": (mori.PRIMITIVES, "MaxFinite = 240.0f", "MaxFinite = 224.0f"),
    "InterNodeV1 loses chunks": (INTERNODE, "(bid % numRecvBlock) * warpNum", "(blockId % numRecvBlock) * warpNum"),
    "loader of kernel modules": ("mori/ops/_jit_loader.py", "_loaded_modules", "_modules"),
    "default size of the heap": (mori.HEAP, "HEAP_SIZE = 4ULL", "HEAP_SIZE = 2ULL"),
    "launch geometry under MANUAL": (mori.OPERATOR, "return 256, 16", "return 128, 16"),
    "variables that distbench does not know": (mori.OPERATOR, '"MORI_EP_LAUNCH_CONFIG_MODE"', '"MORI_EP_NEW"'),
    "defaults of the profiles' variables": (
        sglang.ENVIRON,
        "DISPATCH_POLICY = EnvInt(2)",
        "DISPATCH_POLICY = EnvInt(0)",
    ),
    "reasons to fall back to EPv1": (sglang.HOOK, "if cfg.tp_size > 8", "if cfg.tp_size > 16"),
    "launch geometry of each node and architecture": (vllm.MANAGER, "block_num = 80", "block_num = 96"),
    "variables of vLLM's ROCm paths": (vllm.ENVS, '"VLLM_ROCM_FP8_PADDING": ', '"VLLM_ROCM_FP8_PAD": '),
    "variables that SGLang reads": (sglang.DISPATCHER, "SGLANG_MORI_RECV_BOUND", "SGLANG_MORI_RECEIVE_BOUND"),
    "words of SGLANG_MORI_DISPATCH_DTYPE": (sglang.DISPATCHER, 'epv2_dtypes = ("", ', 'epv2_dtypes = ("", "fp6", '),
    "words of SGLANG_MORI_COMBINE_DTYPE": (
        sglang.DISPATCHER,
        'combine_dtype == "fp8_direct_cast"',
        'combine_dtype == "cast"',
    ),
    "words of SGLANG_MORI_RECV_BOUND": (sglang.ENVIRON, '"yes"', '"on"'),
    "words of boolean variables": (
        sglang.COMMON,
        'truthy_values = ("true", "1")',
        'truthy_values = ("true", "1", "on")',
    ),
    "launch geometry of each mode": (sglang.DISPATCHER, "block_num=80", "block_num=96"),
    "grid clamped to the compute units": (
        sglang.DISPATCHER,
        "min(block_num, cu_count)",
        "min(block_num, cu_count // 2)",
    ),
    "keywords of MoRI's configuration": (sglang.DISPATCHER, "num_qp_per_pe=2", "num_qp_per_pe=4"),
    "receive bound": (sglang.DISPATCHER, "MORI_LOGICAL_RECV_ROW_ALIGN = 32", "MORI_LOGICAL_RECV_ROW_ALIGN = 64"),
    "cut in front of fused_moe": (sglang.RUNNER, "topk_ids = topk_ids[:mori_max]", "pass"),
    "arguments of combine": (sglang.DISPATCHER, "hidden_states, None, topk_ids", "hidden_states, weights, topk_ids"),
    "bucket of each number of rows": (of_aiter.MOE, "1024", "2048"),
    "rows of a tile without a tuned row": (of_aiter.MOE, "support_list = [32, 64, 128]", "support_list = [32, 128]"),
    "top-k counts one less under an expert mask": (
        *(of_aiter.MOE, "    global cfg_2stages\n", "    topk -= int(is_ep)\n    global cfg_2stages\n"),
    ),
    "a tier without a row takes that of a lower one": (
        *(of_aiter.MOE, "import torch\n", "import torch\n# for fallback_tier in reversed(\n"),
    ),
    "variables that override the choice": (
        of_aiter.MOE,
        "import torch\n",
        'import torch\nos.environ.get("AITER_KSPLIT", "0")\n',
    ),
    "arguments of fused_moe": (of_aiter.MOE, "    topk_ids,\n    expert_mask", "    topk_idx,\n    expert_mask"),
    "arguments of the selection": (of_aiter.MOE, "    bias2,\n):", "    bias2,\n    layout,\n):"),
    "fields of a choice": (of_aiter.MOE, "    ksplit: int\n", "    split: int\n"),
    "log line of a choice": (of_aiter.MOE, "[fused_moe] using", "[moe] using"),
    "fp8 format of each architecture": (
        of_aiter.TYPES,
        '"gfx950": {"fp8": torch.float8_e4m3fn}',
        '"gfx950": {"fp8": torch.float8_e4m3fnuz}',
    ),
    "numbers of activations and quantisations": (of_aiter.ENUMS, "per_1x128", "per_1x64, per_1x128"),
    "columns of the tuned table": (of_aiter.TABLE, "ksplit", "split"),
    "what methods of Buffer return": (
        of_deep_ep.LEGACY,
        "return packed_recv_x, packed_recv_count, handle",
        "return packed_recv_count, packed_recv_x, handle",
    ),
    "fields of Buffer's handles": (
        of_deep_ep.LEGACY,
        "handle = (packed_recv_src_info, packed_recv_layout_range,",
        "handle = (packed_recv_layout_range, packed_recv_src_info,",
    ),
    "parameters of Buffer's methods": (of_deep_ep.LEGACY, "use_logfmt: bool", "use_log: bool"),
    "bounds of Buffer": (of_deep_ep.LEGACY, "num_max_dispatch_tokens_per_rank + 1) * 2", "num_max_tokens + 1) * 4"),
    "path of the tuned table": (of_aiter.CORE, "AITER_CONFIG_FMOE_FILE", "FMOE_FILE"),
    "tiles of CK without a tuned row": (of_aiter.TILES, "V1, 256, 32, 64, 128/sizeof", "V1, 256, 32, 128, 128/sizeof"),
}


def source_of(one: Distribution, version: str = "") -> Source:
    """The pinned wheel; skips the test without a package index, and vLLM's where no wheel is named."""
    if one == VLLM:
        if not VLLM_WHEEL:
            pytest.skip("DISTBENCH_VLLM_WHEEL names no wheel")
        return Source(Path(VLLM_WHEEL))
    try:
        return Source(pinned(one, version))
    except Unreachable:
        pytest.skip("no package index within reach of pip")


@pytest.fixture(scope="module", params=RELEASES)
def source(request: pytest.FixtureRequest) -> Source:
    return source_of(*RELEASES[request.param])


def facts_of(source: Source) -> tuple[Fact, ...]:
    packages = {MORI.name: "mori", NIGHTLY.name: "mori", SGLANG.name: "sglang", AITER.name: "aiter", VLLM.name: "vllm"}
    packages[DEEP_EP.name] = "deep_ep"
    return tuple(fact for fact in FACTS if fact.package == packages[source.distribution])


def test_every_fact_matches_the_pinned_release(source: Source) -> None:
    found = [check(fact, source) for fact in facts_of(source)]
    assert [(one.fact.name, one.detail) for one in found if one.state != "matches"] == []


def test_every_fact_matches_the_last_sglang_with_the_older_rules() -> None:
    older = source_of(SGLANG, OLDER)
    same = [fact for fact in facts_of(older) if fact.name in SAME_IN_OLDER]
    assert len(same) == len(SAME_IN_OLDER)
    assert [(fact.name, check(fact, older).detail) for fact in same if check(fact, older).state != "matches"] == []


SAME_IN_OLDER = ("variables that SGLang reads", "grid clamped to the compute units")


def mutated(source: Source, fact: Fact) -> Mapping[str, str]:
    """Text of one file with the fact changed: its mutation, or the first lifted definition renamed."""
    if fact.name not in MUTATIONS:
        assert fact.name.startswith("definitions lifted from "), fact.name
        definitions = (OF_SGLANG | OF_VLLM)[fact.file]
        name = definitions[-1].rpartition(".")[2]
        return {fact.file: source.read(fact.file).replace(name, f"{name}_renamed")}
    file, old, new = MUTATIONS[fact.name]
    text = source.read(file)
    assert old in text, (fact.name, old)
    return {file: text.replace(old, new)}


def test_changed_text_is_reported_under_the_name_of_its_fact(source: Source) -> None:
    for fact in facts_of(source):
        found = check(fact, source.changed(mutated(source, fact)))
        assert (found.fact.name, found.state) == (fact.name, "no longer matches"), fact.name
        assert found.detail, fact.name


def test_empty_file_is_a_change_and_broken_text_cannot_be_read(source: Source) -> None:
    facts = [fact for fact in facts_of(source) if fact.file.endswith(".py")]
    assert {check(fact, source.changed({fact.file: ""})).state for fact in facts} == {"no longer matches"}
    broken = {check(fact, source.changed({fact.file: "def ("})).state for fact in facts}
    assert "cannot be read" in broken
    assert "matches" not in broken


def test_every_variable_that_sglang_reads_is_recorded() -> None:
    assert set(recorded_environment(dict.fromkeys(VARIABLES, "1"))) == set(VARIABLES)


def test_parameters_in_another_order_are_a_change() -> None:
    source = source_of(MORI)
    fact = next(fact for fact in FACTS if fact.name == "fields and defaults of the configuration")
    text = source.read(mori.OPERATOR)
    swapped = text.replace("    rank: int\n    world_size: int\n", "    world_size: int\n    rank: int\n")
    assert swapped != text
    assert "rank (position 2)" in check(fact, source.changed({mori.OPERATOR: swapped})).detail


def test_names_of_facts_are_unique_in_a_package_and_no_mutation_is_left_over() -> None:
    keys = [(fact.package, fact.name) for fact in FACTS]
    assert len(set(keys)) == len(keys)
    assert set(MUTATIONS) <= {fact.name for fact in FACTS}
