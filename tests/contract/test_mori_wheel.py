"""The adapter and the stand-in against the released amd-mori 1.2.4: more than the named facts of test_facts.py.

The wheel is read, never imported: importing mori needs a ROCm machine. It holds the C++ of the kernels too, since these
are compiled where they run. Pure functions of the wheel are executed.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from distbench.transport.mori.config import plan_mori
from distbench.transport.mori.emulated import ops
from distbench.transport.mori.emulated.launch import Launches
from distbench.transport.mori.emulated.routing import EpDispatchCombineKernelType
from tests.cases import tiny_case
from tests.contract.facts.mori_facts import geometry_config, ours
from tests.contract.facts.source import signature
from tests.contract.wheels import mori_wheel

VERSION = "1.2.4"
SOURCES = "mori/_jit-sources/"


@pytest.fixture(scope="module")
def wheel() -> Iterator[zipfile.ZipFile]:
    with mori_wheel(VERSION) as archive:
        yield archive


def text(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(name).decode()


def class_of(wheel: zipfile.ZipFile, name: str) -> ast.ClassDef:
    body = ast.parse(text(wheel, "mori/ops/dispatch_combine.py")).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)


def test_configuration_keywords_of_the_adapter_are_fields_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    fields = {
        ast.unparse(node.target)
        for node in class_of(wheel, "EpDispatchCombineConfig").body
        if isinstance(node, ast.AnnAssign)
    }
    case = tiny_case(4, transport="mori", combine_input="registered", prealloc_max_recv_tokens=32)
    given = set(plan_mori(case, {}).values(case, 0)) | {"data_type", "kernel_type"}
    assert given == fields


def test_local_expert_count_of_the_stand_in_is_refused_under_the_wheels_name(wheel: zipfile.ZipFile) -> None:
    tree = ast.parse(text(wheel, "mori/ops/local_expert_count.py"))
    name = "launch_local_expert_count"
    (theirs,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert ours(ops.launch_local_expert_count) == signature(theirs)
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
        config = geometry_config(kernel)
        automatic = _auto_constants(wheel, kernel) if mode == "AUTO" else (None, None, None)
        theirs = SimpleNamespace(config=config, _dispatch_rules=None, _combine_rules=None)
        for name, number in zip(("block_num", "rdma_block_num", "warp_per_block"), automatic, strict=True):
            setattr(theirs, f"auto_{name}", number)
        bound = {name: partial(scope[name], theirs) for name in names}
        vars(theirs).update(bound)
        launches = Launches(config)
        for dispatch in (True, False):
            which = {"is_intranode_dispatch": dispatch, "is_intranode_combine": not dispatch}
            assert launches.taken(asked, dispatch=dispatch) == bound["_resolve_launch_params"](*asked, **which)
            assert launches.asked(asked) == bound["get_launch_config"](dispatch, *asked)


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
    scope = {
        "self": chosen,
        "config": geometry_config(kernel),
        "EpDispatchCombineKernelType": EpDispatchCombineKernelType,
    }
    exec(compile(ast.Module([branch], []), "wheel", "exec"), scope)  # noqa: S102 - constants of a release
    return chosen.auto_block_num, chosen.auto_rdma_block_num, chosen.auto_warp_per_block


def test_fp8_kernels_exist_for_the_format_of_each_architecture(wheel: zipfile.ZipFile) -> None:
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
