"""ATOM's definitions in namespaces of their own, with the globals and modules that they use."""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from distbench.callers.atom.definitions import DEFINITIONS
from distbench.callers.lift import Lift, Stub, Unreached
from distbench.callers.packages import PackageText
from distbench.callers.setting import Setting
from distbench.callers.text import CallerText
from distbench.case.atom_folder import KERNEL, PLUGIN, PLUGIN_CONFIG, PREPARE
from distbench.workload.quantize import fp8_dtype

_STANDARD: dict[str, Any] = {
    "torch": torch,
    "ABC": abc.ABC,
    "abstractmethod": abc.abstractmethod,
    "dataclass": dataclasses.dataclass,
    "Enum": enum.Enum,
    "final": typing.final,
    "functools": functools,
}
_FULL = "FULL"
_TWO_BATCHES = ("tbo_active", "tbo_maybe_run_recv_hook", "tbo_register_recv_hook", "tbo_yield")


class Package(NamedTuple):
    """aiter as lifted code imports it, the device's compute units, and the sender's quantiser."""

    aiter: Any
    compute_units: int
    fused_moe: Callable[..., Any]
    quantizer: Callable[[Any], Callable[..., Any]]


class Atom(NamedTuple):
    """Lifted classes and functions, and their origin."""

    kernel: Any
    prepare_finalize: Any
    dispatch_format: Callable[..., Any]
    text: CallerText


def load(text: PackageText, setting: Setting, package: Package) -> Atom:
    """Lift ATOM's definitions for one rank, with the patch of the plugin for vLLM where the case has its rule.

    Raises:
        Unsupported: the text lacks a definition, or one needs something that is not provided here.

    """
    lift = Lift(text, _modules(setting, package))

    def lifted(path: str, given: dict[str, Any]) -> dict[str, Any]:
        return lift.lift(path, DEFINITIONS[path], _STANDARD | given)

    context = {"get_forward_context": lambda: Stub(context=_context(setting))}
    launches = {"get_cu_num": lambda: package.compute_units}
    types = {"QuantType": package.aiter.QuantType, "ActivationType": package.aiter.ActivationType}
    kernel = lifted(KERNEL, context | types | _kernel_globals(setting, package))
    modular = Stub(**{name: kernel[name] for name in DEFINITIONS[KERNEL]})
    dtypes = Stub(fp8=fp8_dtype(setting.case.fp8_format), fp4x2=getattr(torch, "float4_e2m1fn_x2", None))
    environment = Stub(ATOM_MORI_FP4_DISPATCH=False)
    given = {"mk": modular, "dtypes": dtypes, "envs": environment, "MORI_AVAILABLE": True}
    prepare = lifted(PREPARE, context | launches | types | given)
    if setting.case.atom_rule == "vllm-plugin":
        threshold = lifted(PLUGIN_CONFIG, {})["VLLM_MORI_LAUNCH_CONFIG_TOKEN_THRESHOLD"]
        patched = {"mk": modular, "MoriPrepareAndFinalize": prepare["MoriPrepareAndFinalize"]}
        named = {"VLLM_MORI_LAUNCH_CONFIG_TOKEN_THRESHOLD": threshold}
        lifted(PLUGIN, launches | patched | named)["apply_vllm_mori_patch"]()
    return Atom(
        kernel["FusedMoEModularKernel"],
        prepare["MoriPrepareAndFinalize"],
        prepare["resolve_mori_dispatch"],
        lift.origin,
    )


def _context(setting: Setting) -> Stub:
    """ATOM's context of a forward pass: a decode batch of all ranks in a bucket, or a batch with a prefill."""
    bucket = setting.case.atom_graph_bs
    return Stub(graph_bs=bucket or max(setting.case.tokens), is_prefill=not bucket, dp_uniform_decode=bool(bucket))


def _kernel_globals(setting: Setting, package: Package) -> dict[str, Any]:
    return {
        "fused_moe": package.fused_moe,
        "get_dp_group": lambda: Stub(world_size=setting.case.ep_size),
        "tbo_overlap_enabled": lambda: False,
        "disable_inplace": lambda: False,
    }


def _modules(setting: Setting, package: Package) -> dict[str, Any]:
    """The import table of the lifted bodies; the plugin sees vLLM's context of a full graph, or of an eager batch."""
    batch = Stub(
        cudagraph_runtime_mode=_FULL if setting.case.atom_graph_bs else "NONE",
        batch_descriptor=Stub(uniform=bool(setting.case.atom_graph_bs)),
    )
    return {
        "aiter": Stub(get_hip_quant=package.quantizer),
        "atom.utils.tbo.ubatching": Stub(**{name: Unreached(name) for name in _TWO_BATCHES}),
        "vllm.config": Stub(CUDAGraphMode=Stub(FULL=_FULL)),
        "vllm.forward_context": Stub(get_forward_context=lambda: batch, is_forward_context_available=lambda: True),
    }
