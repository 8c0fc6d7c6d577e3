"""MoRI: names, defaults, sizes and refusals that the adapter and the stand-in assume, by release."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from distbench.case.sglang_env import KEYS
from distbench.launcher.unused_variables import MORI_READS
from distbench.transport.mori.config import lost_chunks
from distbench.transport.mori.emulated import _jit_loader, moves, ops, shmem
from distbench.transport.mori.emulated.launch import Launches
from distbench.transport.mori.emulated.routing import EpDispatchCombineKernelType
from distbench.utils.amd_arch import LARGEST_FP8
from tests.contract.facts.fact import Fact
from tests.contract.facts.source import Gone, Source, between, execute, signature

PACKAGE = "mori"
JIT = "mori/_jit-sources"
KERNELS = f"{JIT}/src/ops/dispatch_combine"
OPERATOR = "mori/ops/dispatch_combine.py"
HEADER = f"{JIT}/include/mori/ops/dispatch_combine/dispatch_combine.hpp"
PRIMITIVES = f"{JIT}/include/mori/core/transport/p2p/device_primitives.hpp"
HEAP = f"{JIT}/include/mori/shmem/internal.hpp"

_GEOMETRIES = ((-1, -1, -1), (64, 32, 8), (0, 8, 0))


def ours(function: Callable[..., Any]) -> dict[str, str]:
    """Default of each parameter of one of the stand-in's functions, as text; empty for none."""
    parameters = inspect.signature(function).parameters.values()
    return {
        one.name: "" if one.default is inspect.Parameter.empty else str(one.default)
        for one in parameters
        if one.name != "self"
    }


def _numbered(parameters: Mapping[str, str]) -> dict[str, str]:
    """Names with their positions, so that another order is a difference."""
    return {f"{name} (position {index})": default for index, (name, default) in enumerate(parameters.items())}


def _methods(source: Source) -> dict[str, dict[str, str]]:
    body = source.definition(OPERATOR, "EpDispatchCombineOp").body
    public = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    return {
        name: _numbered(signature(node))
        for name, node in sorted(public.items())
        if name == "__init__" or (not name.startswith("_") and name not in ops.NOT_IMITATED)
    }


def _our_methods(source: Source | str) -> dict[str, dict[str, str]]:
    del source
    public = {name for name in dir(ops.EpDispatchCombineOp) if not name.startswith("_")}
    return {name: _numbered(ours(getattr(ops.EpDispatchCombineOp, name))) for name in sorted({"__init__", *public})}


def _fields(source: Source) -> dict[str, str]:
    body = source.definition(OPERATOR, "EpDispatchCombineConfig").body
    fields = (node for node in body if isinstance(node, ast.AnnAssign))
    return _numbered({ast.unparse(node.target): ast.unparse(node.value) if node.value else "" for node in fields})


def _our_fields(_: str) -> dict[str, str]:
    def shown(value: object) -> str:
        if isinstance(value, EpDispatchCombineKernelType):
            return f"EpDispatchCombineKernelType.{value}"
        return "" if value is dataclasses.MISSING else repr(value)

    fields = dataclasses.fields(ops.EpDispatchCombineConfig)
    return _numbered({field.name: shown(field.default) for field in fields})


def _shmem(source: Source) -> dict[str, dict[str, str]]:
    body = source.tree("mori/shmem/api.py").body
    return {
        node.name: _numbered(signature(node))
        for node in body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in shmem.NOT_IMITATED
    }


def _our_shmem(_: str) -> dict[str, dict[str, str]]:
    return {
        name: _numbered(ours(value))
        for name, value in vars(shmem).items()
        if name.startswith("shmem_") and callable(value)
    }


def _exports(source: Source) -> set[str]:
    body = source.tree("mori/ops/__init__.py").body
    return {
        alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
    } & set(ops.__all__)


def _enum(source: Source) -> dict[str, int]:
    matched = re.search(r"enum (?:class )?KernelType \{(.*?)\}", source.read(HEADER), re.DOTALL)
    return {name: int(number) for name, number in re.findall(r"(\w+) = (\d)", matched[1] if matched else "")}


def _quant_types(source: Source) -> tuple[str, ...]:
    return tuple(re.findall(r'^    "(\w+)": EpDispatchCombineQuantType', source.read(OPERATOR), re.MULTILINE))


def _modules(source: Source) -> dict[str, str]:
    table = source.definition(OPERATOR, "_KERNEL_TYPE_TO_HIP").value
    kinds = [ast.unparse(kind).rpartition(".")[2] for kind in table.keys]
    found = dict(zip(kinds, map(ast.literal_eval, table.values), strict=True))
    return {kind: name for kind, name in found.items() if kind != "InterNode"}


def _rows(source: Source) -> dict[str, str]:
    text = source.read(HEADER)
    names = ("MaxNumTokensToSend", "MaxNumTokensToRecvPerRank", "MaxNumTokensToRecv")
    return {name: " ".join(between(text, f"int {name}() const {{", "\n  }").split()[3:]) for name in names}


_ROWS = {
    "MaxNumTokensToSend": "{ return worldSize * MaxNumTokensToSendPerRank();",
    "MaxNumTokensToRecvPerRank": (
        "{ if (maxTotalRecvTokens > 0) { int perRank = (maxTotalRecvTokens + worldSize - 1) / worldSize; return "
        "perRank < maxNumInpTokenPerRank ? perRank : maxNumInpTokenPerRank; } return maxNumInpTokenPerRank;"
    ),
    "MaxNumTokensToRecv": "{ return worldSize * MaxNumTokensToRecvPerRank();",
}


def _asserted(source: Source) -> dict[str, bool]:
    names = ("intranode.hpp", "intranode_ll.hpp", "internode_v1.cpp", "low_latency_async.cpp")
    return {name: "Total recv token overflow" in source.read(f"{KERNELS}/{name}") for name in names}


def _barriers(source: Source) -> tuple[int, bool]:
    text = ast.unparse(source.definition(OPERATOR, "EpDispatchCombineOp.__init__"))
    return text.count("dist.barrier()"), text.rstrip().endswith("dist.barrier()")


_GUARDS = dict.fromkeys(
    (
        "rows of combine's indices are checked",
        "fp4 is refused off gfx950",
        "dispatch records its geometry",
        "combine records its geometry",
    ),
    True,
)


def _guards(source: Source) -> dict[str, bool]:
    text = source.read(OPERATOR)
    constructor = ast.unparse(source.definition(OPERATOR, "EpDispatchCombineOp.__init__"))
    launched = "self._cached_{}_launch = (actual_bn, actual_rbn, actual_wpb)"
    found = (
        "self._check_combine_indices(indices, cur_n)" in text,
        "if 'gfx950' not in _arch:\n            raise ValueError(" in constructor,
        launched.format("dispatch") in text,
        launched.format("combine") in text,
    )
    return dict(zip(_GUARDS, found, strict=True))


def _slots_of_ll(source: Source) -> bool:
    return "for (int k = 0; k < kMaxGpusPerNode; ++k)" in source.read(f"{KERNELS}/intranode_ll.hpp")


def _fp8(source: Source) -> dict[str, str]:
    return dict(re.findall(r'_DTYPE_SUFFIX\[torch\.(float8_\w+)\] = "(\w+)"', source.read(OPERATOR)))


def _largest(source: Source) -> list[float]:
    return [float(one) for one in re.findall(r"kCombineInternalFp8MaxFinite = (\d+\.0)f;", source.read(PRIMITIVES))]


def _chunks(source: Source) -> bool:
    receive = between(source.read(f"{KERNELS}/internode_v1.cpp"), "void DispatchInterNodeRecv(", "\n}\n")
    return "(bid % numRecvBlock) * warpNum" not in receive


def _loader(source: Source) -> dict[str, str]:
    source.definition("mori/ops/_jit_loader.py", "_loaded_modules")
    return _numbered(signature(source.definition("mori/ops/_jit_loader.py", "load_hip_module")))


def _default_heap(source: Source) -> int:
    matched = re.search(r"DEFAULT_STATIC_SYMMETRIC_HEAP_SIZE = (\d+)ULL((?: \* 1024)*)", source.read(HEAP))
    if matched is None:
        message = f"no DEFAULT_STATIC_SYMMETRIC_HEAP_SIZE in {HEAP}"
        raise Gone(message)
    return int(matched[1]) << 10 * matched[2].count("1024")


def _variables(source: Source) -> set[str]:
    """Variables in the text that distbench does not know as read by MoRI's expert-parallel path."""
    named: set[str] = set()
    for name in source.files():
        if re.match(r"mori/(?:ops|shmem|jit|_jit-sources/(?:src|include))/.*\.(?:py|[ch]pp|h|hip)$", name):
            named |= set(re.findall(r'"(MORI_[A-Z0-9_]+)"', source.read(name)))
    return {name for name in named if not name.startswith("MORI_IO_")} - _ELSEWHERE - MORI_READS - set(KEYS)


_ELSEWHERE = frozenset(
    f"MORI_{name}"
    for name in (
        *("EP_COMB_GEOM", "EP_DISP_GEOM", "EP_TOKOFF_EXT", "V2_KERNEL_BACKEND", "V2_LIB_DIR"),  # EPv2
        *("GEMM_AR_PULL_BLOCKS", "HIER_LOCAL_PUSHONLY", "SYMM_PER_RANK_VMM", "UMBP_LOG_LEVEL"),  # other operators
        "DEVICE_IONIC_CCQE",  # set and read by MoRI's compiler of kernels
    )
)


def geometry_config(kernel: EpDispatchCombineKernelType) -> ops.EpDispatchCombineConfig:
    """A configuration for the choice of a geometry."""
    import torch  # noqa: PLC0415

    sizes = {"hidden_dim": 64, "scale_dim": 0, "scale_type_size": 4, "max_token_type_size": 2, "rdma_block_num": 24}
    counts = {"max_num_inp_token_per_rank": 8, "num_experts_per_rank": 2, "num_experts_per_token": 2}
    common = sizes | counts | {"rank": 0, "world_size": 8}
    return ops.EpDispatchCombineConfig(data_type=torch.bfloat16, kernel_type=kernel, **common)  # type: ignore[arg-type]


def _manual(source: Source) -> dict[str, tuple[int, ...]]:
    """Geometry that each call takes under MANUAL, without a tuned table: the wheel's own methods, executed."""
    names = (
        *("_resolve_launch_params", "get_launch_config"),
        *("_intranode_dispatch_default_launch", "_intranode_combine_default_launch"),
    )
    nodes = [source.definition(OPERATOR, f"EpDispatchCombineOp.{name}") for name in names]
    given = {"EpDispatchCombineKernelType": EpDispatchCombineKernelType, "_is_gfx125x": lambda: False}
    scope = execute(nodes, OPERATOR, given)
    found: dict[str, tuple[int, ...]] = {}
    for kernel, asked, dispatch in itertools.product(EpDispatchCombineKernelType, _GEOMETRIES, (True, False)):
        operator = SimpleNamespace(config=geometry_config(kernel), _dispatch_rules=None, _combine_rules=None)
        for name in ("block_num", "rdma_block_num", "warp_per_block"):
            setattr(operator, f"auto_{name}", None)
        bound = {name: partial(scope[name], operator) for name in names}
        vars(operator).update(bound)
        which = {"is_intranode_dispatch": dispatch, "is_intranode_combine": not dispatch}
        key = f"{kernel} {'dispatch' if dispatch else 'combine'} {asked}"
        found[key] = tuple(bound["_resolve_launch_params"](*asked, **which))
    return found


def _our_manual(_: str) -> dict[str, tuple[int, ...]]:
    launches = {kernel: Launches(geometry_config(kernel)) for kernel in EpDispatchCombineKernelType}
    return {
        f"{kernel} {'dispatch' if dispatch else 'combine'} {asked}": launches[kernel].taken(asked, dispatch=dispatch)
        for kernel, asked, dispatch in itertools.product(EpDispatchCombineKernelType, _GEOMETRIES, (True, False))
    }


def _constant(value: object) -> Callable[[str], Any]:
    return lambda _: value


_Row = tuple[str, str, Callable[[Source], Any], Callable[[str], Any]]
_ROWS_OF_FACTS: tuple[_Row, ...] = (
    ("parameters of the operator's methods", OPERATOR, _methods, _our_methods),
    ("fields and defaults of the configuration", OPERATOR, _fields, _our_fields),
    ("parameters of shmem's functions", "mori/shmem/api.py", _shmem, _our_shmem),
    ("names that mori.ops exports", "mori/ops/__init__.py", _exports, _constant(set(ops.__all__))),
    (
        "kernel types and their numbers",
        HEADER,
        _enum,
        _constant({one.name: one.value for one in EpDispatchCombineKernelType}),
    ),
    ("words for the combine's quantisation", OPERATOR, _quant_types, _constant(moves.QUANT_TYPES)),
    (
        "kernel module of each kernel type",
        OPERATOR,
        _modules,
        _constant({one.name: name for one, name in moves.HIP_NAMES.items()}),
    ),
    ("rows of the receive buffer", HEADER, _rows, _constant(_ROWS)),
    (
        "overflow asserted in dispatch",
        KERNELS,
        _asserted,
        _constant(
            {"intranode.hpp": False, "intranode_ll.hpp": True, "internode_v1.cpp": True, "low_latency_async.cpp": True}
        ),
    ),
    ("barriers of the constructor", OPERATOR, _barriers, _constant((2, True))),
    ("guards of the operator", OPERATOR, _guards, _constant(_GUARDS)),
    ("IntraNodeLL looks at eight slots", f"{KERNELS}/intranode_ll.hpp", _slots_of_ll, _constant(True)),
    (
        "fp8 types of the kernels",
        OPERATOR,
        _fp8,
        _constant({"float8_e4m3fn": "fp8_ocp", "float8_e4m3fnuz": "fp8_fnuz"}),
    ),
    (
        "largest fp8 of a quantised combine",
        PRIMITIVES,
        _largest,
        _constant([LARGEST_FP8["e4m3fn"], LARGEST_FP8["e4m3fnuz"]]),
    ),
    (
        "InterNodeV1 loses chunks",
        f"{KERNELS}/internode_v1.cpp",
        _chunks,
        lambda version: bool(lost_chunks("InterNodeV1", 42, version)),
    ),
    (
        "loader of kernel modules",
        "mori/ops/_jit_loader.py",
        _loader,
        _constant(_numbered(ours(_jit_loader.load_hip_module))),
    ),
    ("default size of the heap", HEAP, _default_heap, _constant(4 << 30)),
    ("launch geometry under MANUAL", OPERATOR, _manual, _our_manual),
    ("variables that distbench does not know", JIT, _variables, _constant(set())),
)


FACTS = tuple(Fact(name, PACKAGE, file, found, expected) for name, file, found, expected in _ROWS_OF_FACTS)
