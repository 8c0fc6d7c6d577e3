"""MoRI's constructor: the buffers of each kernel type, their bytes, and the variables that it refuses, by release."""

from __future__ import annotations

import re
from typing import Any

from distbench.transport.mori.config import SMALL_BUFFERS, MoriPlan, plan_mori
from distbench.transport.mori.releases import (
    NO_ATOMICS,
    RAIL_ONLY,
    RELAXED_ORDERING,
    async_buffers,
    reads_atomics_switch,
)
from tests.cases import tiny_case
from tests.contract.facts.cplusplus import buffer_sizes, cpp_config
from tests.contract.facts.fact import Fact
from tests.contract.facts.source import Gone, Source, between

PACKAGE = "mori"
CONSTRUCTOR = "mori/_jit-sources/src/ops/dispatch_combine/dispatch_combine.cpp"

_SCALE_BLOCKS = 56
_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"mori_kernel": "IntraNode"},
    {"mori_kernel": "IntraNode", "combine_quant": "fp8_blockwise"},
    {"mori_kernel": "IntraNode", "combine_quant": "fp4_blockwise", "numerics": "gaussian"},
    {"mori_kernel": "IntraNodeLL", "dispatch_dtype": "fp8"},
    {"mori_kernel": "InterNodeV1", "gpu_per_node": 4},
    {"mori_kernel": "InterNodeV1LL", "gpu_per_node": 2, "dispatch_dtype": "fp8"},
    {"mori_kernel": "AsyncLL", "dispatch_dtype": "fp8", "combine_quant": "fp8_blockwise"},
    {"mori_kernel": "AsyncLL", "gpu_per_node": 4, "prealloc_max_recv_tokens": 32},
)
_STAGED = ("dispatchInp", "combineInp", "staging", "dispatchOut", "combineOut", "dispatchStaging")
_MAP_SLOTS = "static_cast<size_t>(config.MaxNumTokensToSend()) * config.numExpertPerRank"


def _body(source: Source) -> str:
    start = "void EpDispatchCombineHandle::InitializeShmemBuf() {"
    return between(source.read(CONSTRUCTOR), start, "\n}\n").removeprefix(start)


def _plans(version: str) -> dict[str, tuple[MoriPlan, Any]]:
    cases = [tiny_case(8, transport="mori", emulate=True, tokens=1, **values) for values in _LAYOUTS]
    return {
        " ".join(str(value) for value in values.values()): (plan_mori(case, {}, version=version), case)
        for values, case in zip(_LAYOUTS, cases, strict=True)
    }


def _sizes(source: Source) -> dict[str, dict[str, int]]:
    body, plans = _body(source), _plans(source.version)
    return {name: buffer_sizes(body, cpp_config(plan, case, _SCALE_BLOCKS)) for name, (plan, case) in plans.items()}


def _heap(source: Source) -> dict[str, int]:
    plans, sizes = _plans(source.version), _sizes(source)
    text = " ".join(between(source.read(CONSTRUCTOR), "Handle::InitializeOrderMapBuf() {", "\n}\n").split())
    if f"maxNumOutToken = {_MAP_SLOTS};" not in text:
        message = f"no maxNumOutToken = {_MAP_SLOTS} in InitializeOrderMapBuf"
        raise Gone(message)
    cases = {name: case for name, (_, case) in plans.items()}
    return {
        name: sum(sizes[name].values()) + 4 * case.ep_size * case.max_dispatch_tokens_per_rank * case.experts_per_rank
        for name, case in cases.items()
    }


def _our_heap(version: str) -> dict[str, int]:
    return {name: plan.heap_bytes - SMALL_BUFFERS for name, (plan, _) in _plans(version).items()}


def _staging(source: Source) -> dict[str, tuple[str, ...]]:
    found = {name: tuple(one for one in sizes if one in _STAGED) for name, sizes in _sizes(source).items()}
    return {name.partition(" ")[0]: buffers for name, buffers in found.items()}


def _our_staging(version: str) -> dict[str, tuple[str, ...]]:
    intra, whole = ("combineInp", "dispatchOut", "combineOut"), _STAGED
    in_async = whole if async_buffers(version) == len(whole) - 2 else whole[:-1]
    kernels = {"IntraNode": intra, "IntraNodeLL": intra, "InterNodeV1": whole, "InterNodeV1LL": whole}
    return kernels | {"AsyncLL": in_async}


def _refusals(source: Source) -> set[str]:
    text = source.read(CONSTRUCTOR)
    names = dict(re.findall(r'constexpr const char\* (k\w+Env) = "(\w+)"', text))
    thrown = re.findall(r"throw std::runtime_error\((.*?)\);", text, re.DOTALL)
    thrown = [re.sub(r"\bk\w+Env\b", lambda one: names.get(one[0], one[0]), one) for one in thrown]
    return {name for one in thrown for name in re.findall(r"MORI_\w+", one)}


def _our_refusals(version: str) -> set[str]:
    return {RAIL_ONLY} | ({NO_ATOMICS, RELAXED_ORDERING} if reads_atomics_switch(version) else set())


def _refused_kernels(source: Source) -> dict[str, tuple[str, ...]]:
    """Kernel types that each refusal names in its condition."""
    text = source.read(CONSTRUCTOR)
    pattern = r"if \(((?:[^{};])*?config\.worldSize > config\.gpuPerNode[^{};]*)\) \{\s*throw"
    conditions = re.findall(pattern, text)
    found = [tuple(re.findall(r"KernelType::(\w+)", one)) for one in conditions]
    return {f"refusal {index}": kernels for index, kernels in enumerate(found, 1)}


def _our_refused_kernels(version: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {"refusal 1": ("InterNode", "AsyncLL")}
    if reads_atomics_switch(version):
        found |= {"refusal 2": ("InterNode",), "refusal 3": ("InterNodeV1", "InterNodeV1LL")}
    return found


FACTS = (
    Fact("buffers of each kernel type", PACKAGE, CONSTRUCTOR, _staging, _our_staging),
    Fact("bytes of the symmetric heap", PACKAGE, CONSTRUCTOR, _heap, _our_heap),
    Fact("variables that the constructor refuses", PACKAGE, CONSTRUCTOR, _refusals, _our_refusals),
    Fact("kernel types that the constructor refuses", PACKAGE, CONSTRUCTOR, _refused_kernels, _our_refused_kernels),
)
