"""The adapter and the stand-in against the released amd-mori 1.2.4: every name, keyword, default and field they use.

The wheels are read, never imported: importing mori needs a ROCm machine. They hold the C++ of the kernels too, since
these are compiled where they run; sizes and checks are looked up there.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distbench.transport.mori.config import lost_chunks, plan_mori
from distbench.transport.mori.emulated import _jit_loader, moves, ops, shmem
from distbench.transport.mori.emulated.launch import Launches
from distbench.transport.mori.emulated.routing import EpDispatchCombineKernelType
from distbench.utils.amd_arch import LARGEST_FP8
from tests.cases import tiny_case

VERSION = "1.2.4"
CACHE = Path(os.environ.get("DISTBENCH_TEST_CACHE", Path(tempfile.gettempdir()) / "distbench-wheels"))
PLATFORMS = {"310": "manylinux_2_35_x86_64", "312": "manylinux_2_39_x86_64"}
UNREACHABLE = re.compile(
    r"No module named pip|connection broken|NewConnectionError|ConnectTimeout|Max retries exceeded"
    r"|not a trusted or secure host|Failed to establish|Name or service not known"
    r"|Temporary failure in name resolution|Network is unreachable",
    re.IGNORECASE,
)
SOURCES = "mori/_jit-sources/"


@pytest.fixture(scope="module", params=PLATFORMS)
def wheel(request: pytest.FixtureRequest) -> Iterator[zipfile.ZipFile]:
    python, platform = request.param, PLATFORMS[request.param]
    path = CACHE / f"amd_mori-{VERSION}-cp{python}-cp{python}-{platform}.whl"
    if not path.exists():
        _download(path, python, platform)
    with zipfile.ZipFile(path) as archive:
        yield archive


def _download(path: Path, python: str, platform: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--timeout=20"]
        command += ["--retries=1", "--disable-pip-version-check", "--implementation=cp", f"--abi=cp{python}"]
        command += [f"--python-version={python[0]}.{python[1:]}", f"--platform={platform}", "-d", scratch]
        command.append(f"amd-mori=={VERSION}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        if done.returncode and (UNREACHABLE.search(done.stderr) or "PIP_NO_INDEX" in os.environ):
            pytest.skip("no package index within reach of pip")
        assert done.returncode == 0, done.stderr
        (Path(scratch) / path.name).replace(path)


def text(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(name).decode()


def class_of(wheel: zipfile.ZipFile, name: str) -> ast.ClassDef:
    body = ast.parse(text(wheel, "mori/ops/dispatch_combine.py")).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)


def signature(node: ast.FunctionDef) -> list[tuple[str, str]]:
    """(name, default) of the parameters of a function without `self`; an empty default means none."""
    positional = [argument.arg for argument in node.args.args]
    defaults = [ast.unparse(default) for default in node.args.defaults]
    found = list(zip(positional, [""] * (len(positional) - len(defaults)) + defaults, strict=True))
    by_name = [(one.arg, ast.unparse(default) if default else "") for one, default in _by_name(node)]
    return [pair for pair in found + by_name if pair[0] != "self"]


def _by_name(node: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    return list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))


def our_signature(function: object) -> list[tuple[str, str]]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [
        (one.name, "" if one.default is inspect.Parameter.empty else str(one.default))
        for one in parameters
        if one.name != "self"
    ]


def test_stand_in_methods_have_the_wheels_parameters_and_defaults(wheel: zipfile.ZipFile) -> None:
    theirs = {
        node.name: node for node in class_of(wheel, "EpDispatchCombineOp").body if isinstance(node, ast.FunctionDef)
    }
    public = {name for name in theirs if not name.startswith("_")}
    assert set(ops.NOT_IMITATED) < public
    for name in ("__init__", *sorted(public - set(ops.NOT_IMITATED))):
        assert our_signature(getattr(ops.EpDispatchCombineOp, name)) == signature(theirs[name]), name


def test_stand_in_configuration_has_the_wheels_fields_and_defaults(wheel: zipfile.ZipFile) -> None:
    theirs = {
        ast.unparse(node.target): ast.unparse(node.value) if node.value else ""
        for node in class_of(wheel, "EpDispatchCombineConfig").body
        if isinstance(node, ast.AnnAssign)
    }
    ours = {
        field.name: "" if field.default is dataclasses.MISSING else _shown(field.default)
        for field in dataclasses.fields(ops.EpDispatchCombineConfig)
    }
    assert list(ours.items()) == list(theirs.items())


def _shown(value: object) -> str:
    if isinstance(value, EpDispatchCombineKernelType):
        return f"EpDispatchCombineKernelType.{value}"
    return repr(value)


def test_configuration_keywords_of_the_adapter_are_fields_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    fields = {
        ast.unparse(node.target)
        for node in class_of(wheel, "EpDispatchCombineConfig").body
        if isinstance(node, ast.AnnAssign)
    }
    case = tiny_case(4, transport="mori", combine_input="registered", prealloc_max_recv_tokens=32)
    given = set(plan_mori(case, {}).values(case, 0)) | {"data_type", "kernel_type"}
    assert given == fields


def test_stand_in_shmem_functions_have_the_wheels_parameters(wheel: zipfile.ZipFile) -> None:
    tree = ast.parse(text(wheel, "mori/shmem/api.py"))
    theirs = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    public = {name for name in theirs if not name.startswith("_")}
    assert set(shmem.NOT_IMITATED) < public
    for name in sorted(public - set(shmem.NOT_IMITATED)):
        assert our_signature(getattr(shmem, name)) == signature(theirs[name]), name
    named = {ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)}
    assert "MORI_SHMEM_INIT_WITH_UNIQUEID" in named
    assert "from .api import *" in text(wheel, "mori/shmem/__init__.py")


def test_names_that_the_adapter_imports_are_exported_by_the_wheel(wheel: zipfile.ZipFile) -> None:
    exported = {
        alias.name
        for node in ast.parse(text(wheel, "mori/ops/__init__.py")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(ops.__all__) <= exported
    lazy = text(wheel, "mori/__init__.py")
    assert '"ops"' in lazy
    assert '"shmem"' in lazy
    assert VERSION in text(wheel, "mori/_version.py")


def test_local_expert_count_of_the_stand_in_is_refused_under_the_wheels_name(wheel: zipfile.ZipFile) -> None:
    tree = ast.parse(text(wheel, "mori/ops/local_expert_count.py"))
    name = "launch_local_expert_count"
    (theirs,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert our_signature(ops.launch_local_expert_count) == signature(theirs)
    with pytest.raises(NotImplementedError, match=f"{name} is not imitated"):
        ops.launch_local_expert_count(None, 0, 0, 0)


def test_kernel_module_is_initialised_for_a_world_once_until_it_is_unloaded(
    wheel: zipfile.ZipFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel's own loader is executed over a fake HIP."""
    loader = ast.parse(text(wheel, "mori/ops/_jit_loader.py"))
    told: list[object] = []
    pybinds = SimpleNamespace(shmem_module_init=told.append)
    driver = SimpleNamespace(HipModule=lambda path: SimpleNamespace(_module=SimpleNamespace(value=path)))
    for name, module in {"libmori_pybinds": pybinds, "mori.jit.hip_driver": driver}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("mori", "mori.jit"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    scope: dict[str, Any] = {}
    exec(compile(loader, "wheel", "exec"), scope)  # noqa: S102 - a release's own loader
    scope["_compiled_hsaco"]["ep_async_ll"] = "path"
    load, modules = scope["load_hip_module"], scope["_loaded_modules"]
    assert load("ep_async_ll") is load("ep_async_ll") is modules["ep_async_ll"]
    assert told == ["path"]
    modules.clear()
    load("ep_async_ll")
    assert told == ["path", "path"]
    functions = [node for node in loader.body if isinstance(node, ast.FunctionDef)]
    (theirs,) = (node for node in functions if node.name == "load_hip_module")
    assert our_signature(_jit_loader.load_hip_module) == signature(theirs)


def test_kernels_of_each_kernel_type_equal_the_wheels(wheel: zipfile.ZipFile) -> None:
    tree = ast.parse(text(wheel, "mori/ops/dispatch_combine.py"))
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_KERNEL_TYPE_TO_HIP"
    )
    assert isinstance(table, ast.Dict)
    kinds = [ast.unparse(kind).rpartition(".")[2] for kind in table.keys if kind is not None]
    theirs = dict(zip(kinds, map(ast.literal_eval, table.values), strict=True))
    ours = {kind.name: name for kind, name in moves.HIP_NAMES.items()}
    assert ours == {kind: name for kind, name in theirs.items() if kind != "InterNode"}


@pytest.mark.parametrize("mode", ["MANUAL", "AUTO"])
def test_launch_geometry_without_a_tuned_table_equals_the_wheels(
    wheel: zipfile.ZipFile, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORI_EP_LAUNCH_CONFIG_MODE", mode)
    names = {"_resolve_launch_params", "get_launch_config", "_intranode_dispatch_default_launch"}
    names.add("_intranode_combine_default_launch")
    lifted = [node for node in class_of(wheel, "EpDispatchCombineOp").body if getattr(node, "name", "") in names]
    assert len(lifted) == len(names)
    scope: dict[str, Any] = {"EpDispatchCombineKernelType": EpDispatchCombineKernelType, "_is_gfx125x": lambda: False}
    exec(compile(ast.Module(lifted, []), "wheel", "exec"), scope)  # noqa: S102 - a release's own pure functions
    for kernel, asked in itertools.product(EpDispatchCombineKernelType, [(-1, -1, -1), (64, 32, 8), (0, 8, 0)]):
        config = config_of(kernel)
        automatic = _auto_constants(wheel, kernel) if mode == "AUTO" else (None, None, None)
        theirs = SimpleNamespace(config=config, _dispatch_rules=None, _combine_rules=None)
        for name, number in zip(("block_num", "rdma_block_num", "warp_per_block"), automatic, strict=True):
            setattr(theirs, f"auto_{name}", number)
        bound = {name: partial(scope[name], theirs) for name in names}
        vars(theirs).update(bound)
        ours = Launches(config)
        for dispatch in (True, False):
            which = {"is_intranode_dispatch": dispatch, "is_intranode_combine": not dispatch}
            assert ours.taken(asked, dispatch=dispatch) == bound["_resolve_launch_params"](*asked, **which)
            assert ours.asked(asked) == bound["get_launch_config"](dispatch, *asked)


def _auto_constants(wheel: zipfile.ZipFile, kernel: EpDispatchCombineKernelType) -> tuple[int, ...]:
    """Run the branch of the wheel's constructor that chooses the fallback of AUTO."""
    constructor = class_of(wheel, "EpDispatchCombineOp").body[0]
    (branch,) = (
        node
        for node in ast.walk(constructor)
        if isinstance(node, ast.If)
        and ast.unparse(node.test).startswith("config.kernel_type.value == EpDispatch")
        and "InterNodeV1.value" in ast.unparse(node.test)
        and "auto_block_num" in ast.unparse(node.body[0])
    )
    chosen = SimpleNamespace()
    scope = {"self": chosen, "config": config_of(kernel), "EpDispatchCombineKernelType": EpDispatchCombineKernelType}
    exec(compile(ast.Module([branch], []), "wheel", "exec"), scope)  # noqa: S102 - constants of a release
    return chosen.auto_block_num, chosen.auto_rdma_block_num, chosen.auto_warp_per_block


def config_of(kernel: EpDispatchCombineKernelType) -> ops.EpDispatchCombineConfig:
    return ops.EpDispatchCombineConfig(
        data_type=torch.bfloat16,
        rank=0,
        world_size=8,
        hidden_dim=64,
        scale_dim=0,
        scale_type_size=4,
        max_token_type_size=2,
        max_num_inp_token_per_rank=8,
        num_experts_per_rank=2,
        num_experts_per_token=2,
        kernel_type=kernel,
        rdma_block_num=24,
    )


def test_wheel_records_the_geometry_that_it_launched(wheel: zipfile.ZipFile) -> None:
    operator = text(wheel, "mori/ops/dispatch_combine.py")
    for phase in ("dispatch", "combine"):
        assert f"self._cached_{phase}_launch = (actual_bn, actual_rbn, actual_wpb)" in operator


def test_wheel_refuses_fp4_except_on_gfx950_as_the_adapter_does(wheel: zipfile.ZipFile) -> None:
    constructor = ast.unparse(class_of(wheel, "EpDispatchCombineOp").body[0])
    assert "if 'gfx950' not in _arch:\n            raise ValueError(" in constructor


def test_kernel_and_quant_type_values_equal_the_wheels(wheel: zipfile.ZipFile) -> None:
    header = text(wheel, f"{SOURCES}include/mori/ops/dispatch_combine/dispatch_combine.hpp")
    (enum,) = re.findall(r"enum KernelType \{(.*?)\}", header, re.DOTALL) or re.findall(
        r"enum class KernelType \{(.*?)\}", header, re.DOTALL
    )
    theirs = {name: int(number) for name, number in re.findall(r"(\w+) = (\d)", enum)}
    assert {kind.name: kind.value for kind in EpDispatchCombineKernelType} == theirs
    quants = re.findall(
        r'^    "(\w+)": EpDispatchCombineQuantType', text(wheel, "mori/ops/dispatch_combine.py"), re.MULTILINE
    )
    assert tuple(quants) == moves.QUANT_TYPES


def test_receive_buffer_rows_follow_the_wheels_formula(wheel: zipfile.ZipFile) -> None:
    header = text(wheel, f"{SOURCES}include/mori/ops/dispatch_combine/dispatch_combine.hpp")
    assert "int perRank = (maxTotalRecvTokens + worldSize - 1) / worldSize;" in header
    assert "return perRank < maxNumInpTokenPerRank ? perRank : maxNumInpTokenPerRank;" in header
    assert "return worldSize * MaxNumTokensToRecvPerRank();" in header
    common = text(wheel, f"{SOURCES}src/ops/dispatch_combine/common.hpp")
    assert "return pe * config.MaxNumTokensToSendPerRank() + slotId;" in common
    heap = text(wheel, f"{SOURCES}include/mori/shmem/internal.hpp")
    assert "DEFAULT_STATIC_SYMMETRIC_HEAP_SIZE = 4ULL * 1024 * 1024 * 1024" in heap


def test_default_quirks_are_those_of_the_wheels_sources(wheel: zipfile.ZipFile) -> None:
    kernels = f"{SOURCES}src/ops/dispatch_combine/"
    overflow = "Total recv token overflow"
    assert overflow not in text(wheel, f"{kernels}intranode.hpp")
    for name in ("intranode_ll.hpp", "internode_v1.cpp", "low_latency_async.cpp"):
        assert overflow in text(wheel, f"{kernels}{name}")
    assert "for (int k = 0; k < kMaxGpusPerNode; ++k)" in text(wheel, f"{kernels}intranode_ll.hpp")
    operator = text(wheel, "mori/ops/dispatch_combine.py")
    assert "self._check_combine_indices(indices, cur_n)" in operator
    constructor = ast.unparse(class_of(wheel, "EpDispatchCombineOp").body[0])
    assert constructor.count("dist.barrier()") == 2
    assert constructor.rstrip().endswith("dist.barrier()")


def test_fp8_kernels_exist_for_the_format_of_each_architecture(wheel: zipfile.ZipFile) -> None:
    operator = text(wheel, "mori/ops/dispatch_combine.py")
    suffixes = dict(re.findall(r'_DTYPE_SUFFIX\[torch\.(float8_\w+)\] = "(\w+)"', operator))
    assert suffixes == {"float8_e4m3fn": "fp8_ocp", "float8_e4m3fnuz": "fp8_fnuz"}
    types = text(wheel, f"{SOURCES}include/mori/utils/data_types.hpp")
    common = text(wheel, f"{SOURCES}src/ops/kernels/ep_common.hip")
    for name in ("FNUZ", "OCP"):
        guarded = (
            rf"#if defined\(HIP_FP8_TYPE_{name}\) && HIP_FP8_TYPE_{name} == 1\s+#define MORI_FP8_TYPE_{name}_ENABLED"
        )
        assert re.search(guarded, types)
        assert f"#ifdef MORI_FP8_TYPE_{name}_ENABLED\n#define MORI_FP8_{name}(...) __VA_ARGS__" in common


def test_fp8_combine_casts_to_the_format_of_the_architecture(wheel: zipfile.ZipFile) -> None:
    primitives = text(wheel, f"{SOURCES}include/mori/core/transport/p2p/device_primitives.hpp")
    ocp, fnuz = (
        "using CombineInternalFp8 = __hip_fp8_e4m3;",
        "#elif defined(MORI_FP8_TYPE_FNUZ_ENABLED)\nusing CombineInternalFp8 = __hip_fp8_e4m3_fnuz;",
    )
    assert 0 < primitives.index(ocp) < primitives.index(fnuz)
    largest = re.findall(r"kCombineInternalFp8MaxFinite = (\d+\.0)f;", primitives)
    assert [float(one) for one in largest] == [LARGEST_FP8["e4m3fn"], LARGEST_FP8["e4m3fnuz"]]


def test_wheel_assigns_chunks_to_any_number_of_rdma_blocks(wheel: zipfile.ZipFile) -> None:
    """Therefore InterNodeV1 and its tables accept any number of RDMA blocks."""
    kernels = text(wheel, f"{SOURCES}src/ops/dispatch_combine/internode_v1.cpp")
    receive, low_latency = (
        re.search(rf"void {name}\(.*?\n}}\n", kernels, re.DOTALL)[0]  # type: ignore[index]
        for name in ("DispatchInterNodeRecv", "DispatchInterNodeLLRecv")
    )
    assert "constexpr int numRecvBlock = 8;" in receive
    assert "(bid % numRecvBlock) * warpNum" in receive
    assert "blockId % numRecvBlock" not in kernels
    assert "numRecvBlock" not in low_latency
    assert lost_chunks("InterNodeV1", 42, VERSION) == ""
    assert lost_chunks("InterNodeV1", 42, "1.2.2")
