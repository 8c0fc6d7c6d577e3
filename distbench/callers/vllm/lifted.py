"""vLLM's definitions in namespaces of their own, with the globals and modules that they use."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from distbench.callers.lift import Lift, Stub, Unreached
from distbench.callers.packages import PackageText
from distbench.callers.setting import Setting
from distbench.callers.text import CallerText
from distbench.callers.vllm.definitions import (
    ACTIVATION,
    AITER_OPS,
    DEFINITIONS,
    EXPERT_MAP,
    EXPERTS,
    KERNEL,
    PREPARE,
)
from distbench.callers.vllm.environment import dispatch_policy
from distbench.workload.quantize import fp8_dtype

_STANDARD: dict[str, Any] = {
    "torch": torch,
    "dataclass": dataclasses.dataclass,
    "Enum": enum.Enum,
    "IntEnum": enum.IntEnum,
    "final": typing.final,
}
_TWO_BATCHES = ("dbo_maybe_run_recv_hook", "dbo_register_recv_hook", "dbo_yield")


class Package(NamedTuple):
    """aiter as lifted code imports it, and the sender's quantiser."""

    aiter: Any
    fused_moe: Callable[..., Any]
    quantizer: Callable[[Any], Callable[..., Any]]


class Vllm(NamedTuple):
    """Lifted classes and functions, and their origin."""

    kernel: Any
    experts: Any
    prepare_finalize: Any
    activation: Any
    expert_map: Callable[..., Any]
    text: CallerText


class _Experts:
    """vLLM's base of experts: the layer's configuration and its quantisation."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        self.moe_config = moe_config
        self.quant_config = quant_config

    @property
    def a2_scale(self) -> Any:
        """A static scale of the second matrix's input."""
        return self.quant_config.a2_scale


class _NoReduction:
    """vLLM's `TopKWeightAndReduceNoOP`: experts have weighted and added already."""


class _OfVllm:
    """`torch` as vLLM's wrapper of aiter sees it: the custom operator is the function that vLLM registers as it."""

    def __init__(self) -> None:
        self.ops = Stub()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def load(text: PackageText, setting: Setting, package: Package) -> Vllm:
    """Lift vLLM's definitions for one rank.

    Raises:
        Unsupported: the release lacks a definition, or one needs something that is not provided here.

    """
    lift = Lift(text, _modules(package))

    def lifted(path: str, given: dict[str, Any]) -> dict[str, Any]:
        return lift.lift(path, DEFINITIONS[path], _STANDARD | given)

    platform = Stub(fp8_dtype=lambda: fp8_dtype(setting.case.fp8_format), is_rocm=lambda: True)
    activation = {"MoEActivation": lifted(ACTIVATION, {})["MoEActivation"]}
    kernel = lifted(KERNEL, _kernel_globals() | activation | {"current_platform": platform})
    wrapper = _OfVllm()
    operators = lifted(AITER_OPS, {"torch": wrapper})
    wrapper.ops = Stub(vllm=Stub(rocm_aiter_fused_moe=operators["_rocm_aiter_fused_moe_impl"]))
    aiter_ops = Stub(fused_moe=operators["rocm_aiter_ops"].fused_moe, get_moe_dispatch_policy=dispatch_policy)
    names = {
        "FusedMoEPrepareAndFinalizeModular": object,
        **{name: kernel[name] for name in ("FusedMoEActivationFormat", "ExpertTokensMetadata")},
        "FusedMoEExpertsModular": kernel["FusedMoEExpertsModular"],
    }
    shared = {"mk": Stub(**names), "current_platform": platform}
    given = {
        "rocm_aiter_ops": aiter_ops,
        "FUSED_MOE_UNQUANTIZED_CONFIG": Unreached("FUSED_MOE_UNQUANTIZED_CONFIG"),
        "TopKWeightAndReduceNoOP": _NoReduction,
    }
    experts = lifted(EXPERTS, shared | activation | given)
    prepare = lifted(PREPARE, shared)
    masks = lifted(EXPERT_MAP, {"ExpertPlacementStrategy": Unreached("ExpertPlacementStrategy")})
    return Vllm(
        kernel["FusedMoEKernelModularImpl"],
        experts["AiterExperts"],
        prepare["MoriPrepareAndFinalize"],
        activation["MoEActivation"],
        masks["determine_expert_map"],
        lift.origin,
    )


def _kernel_globals() -> dict[str, Any]:
    return {name: Unreached(name) for name in (*_TWO_BATCHES, "SharedExpertsOrder", "PIN_MEMORY")} | {
        "FusedMoEExperts": _Experts,
        "UnfinalizedMoEOutput": type("UnfinalizedMoEOutput", (), {}),
        "dbo_enabled": lambda: False,
    }


def _modules(package: Package) -> dict[str, Any]:
    """The import table of the lifted bodies."""
    root = package.aiter
    return {
        "aiter": Stub(
            QuantType=root.QuantType,
            ActivationType=root.ActivationType,
            get_hip_quant=package.quantizer,
            dtypes=Unreached("aiter.dtypes"),
        ),
        "aiter.fused_moe": Stub(fused_moe=package.fused_moe),
        "aiter.ops.flydsl.moe_common": Stub(GateMode=Unreached("GateMode")),
        "vllm._aiter_ops": Stub(rocm_aiter_ops=Stub(is_fused_moe_enabled=lambda: True)),
    }
