"""SGLang's definitions in namespaces of their own, with the globals and modules that they use."""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import inspect
import logging
import typing
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

from distbench.callers.lift import Lift, Stub, Unreached
from distbench.callers.packages import PackageText
from distbench.callers.setting import Setting
from distbench.callers.sglang.definitions import BASE, COMMON, DEFINITIONS, DISPATCHER, ENVIRON, MODES, RUNNER
from distbench.callers.sglang.environment import operating_system, parallel, torch_on
from distbench.callers.text import CallerText
from distbench.workload.quantize import fp8_dtype

_BUILT_FOR_GFX95 = "gfx95"
_TYPING = ("Any", "NamedTuple", "Optional", "TypeGuard", "Union")
_STANDARD: dict[str, Any] = {
    "ABC": abc.ABC,
    "abstractmethod": abc.abstractmethod,
    "contextmanager": contextmanager,
    "dataclass": dataclasses.dataclass,
    "Enum": enum.Enum,
    "auto": enum.auto,
    "functools": functools,
    "lru_cache": functools.lru_cache,
    "inspect": inspect,
    "warnings": warnings,
    **{name: getattr(typing, name) for name in _TYPING if hasattr(typing, name)},
}


class Package(NamedTuple):
    """aiter as lifted code imports it, the device's architecture, and the sender's quantiser."""

    aiter: Any
    gfx: str
    fused_moe: Callable[..., Any]
    quantizer: Callable[[Any], Callable[..., Any]]


class Sglang(NamedTuple):
    """Namespaces of the lifted definitions, and their origin."""

    base: dict[str, Any]
    runner: dict[str, Any]
    dispatcher: dict[str, Any]
    text: CallerText


class _Logger(logging.LoggerAdapter):  # type: ignore[type-arg]
    """SGLang's logger, which has `warning_once`."""

    def warning_once(self, message: str, *arguments: object) -> None:
        """Log a warning."""
        self.warning(message, *arguments)


class BaseDispatcher:
    """SGLang's base of dispatchers, as far as a dispatcher without hooks uses it."""

    def __init__(self) -> None:
        self.quant_config: dict[str, Any] = {}

    def set_quant_config(self, quant_config: dict[str, Any]) -> None:
        """Keep the types that the quantisation method reports."""
        self.quant_config = quant_config


class _NoHooks:
    """Dispatch hooks of a dispatcher that has none."""

    def __call__(self, dispatcher: object) -> None:
        """Call no hook."""


class _KernelType(enum.Enum):
    """MoRI's kernel types."""

    IntraNode = "IntraNode"
    IntraNodeLL = "IntraNodeLL"
    InterNodeV1 = "InterNodeV1"
    InterNodeV1LL = "InterNodeV1LL"
    AsyncLL = "AsyncLL"


class _Backend(enum.Enum):
    AITER = "aiter"
    TRITON = "triton"


class _SmallMoeUnavailable(Exception):
    """The small kernel cannot run here."""


def kernel_type(name: str) -> enum.Enum:
    """MoRI's kernel type of this name, as lifted code sees it."""
    return _KernelType(name)


def load(text: PackageText, setting: Setting, package: Package) -> Sglang:
    """Lift SGLang's definitions for one rank.

    Raises:
        Unsupported: the release lacks a definition, or one needs something that is not provided here.

    """
    modules = _modules(setting, package)
    lift = Lift(text, modules)
    torch = torch_on(setting.device)
    logger = _Logger(logging.getLogger("sglang"), {})
    common = _STANDARD | {"torch": torch, "os": operating_system(setting), "logger": logger}

    def lifted(path: str, given: dict[str, Any]) -> dict[str, Any]:
        return lift.lift(path, DEFINITIONS[path], common | given)

    backend = {"MoeRunnerBackend": _Backend}
    envs = {"envs": lifted(ENVIRON, {})["Envs"]()}
    read = {"get_bool_env_var": lifted(COMMON, {})["get_bool_env_var"]}
    mode = {"DeepEPMode": lifted(MODES, {})["DeepEPMode"]}
    base = lifted(BASE, backend)
    bases = {name: base[name] for name in DEFINITIONS[BASE]}
    gfx95 = package.gfx.startswith(_BUILT_FOR_GFX95)
    runner = lifted(RUNNER, bases | backend | envs | read | {"is_gfx95_supported": lambda: gfx95})
    dispatcher = lifted(DISPATCHER, envs | read | mode | _dispatcher_globals(setting, package))
    for name in ("MoriEPNormalCombineInput", "MoriEPLLCombineInput"):
        setattr(modules["sglang.srt.layers.moe.token_dispatcher.moriep"], name, dispatcher[name])
    return Sglang(base, runner, dispatcher, lift.origin)


def _dispatcher_globals(setting: Setting, package: Package) -> dict[str, Any]:
    place = parallel(setting)
    formats = Stub(DEEPEP_NORMAL="deepep_normal", DEEPEP_LL="deepep_ll")
    unreached = (
        *("init_mori_op", "_record_local_expert_count", "_aiter_supports_mxfp8_dispatch"),
        *("_MoriEPDispatcherImplLowLatency", "_MoriEPv2DispatcherImplNormal"),
    )
    return {name: Unreached(name) for name in unreached} | {
        "BaseDispatcher": BaseDispatcher,
        "MoriEPPDispatchHooks": _NoHooks,
        "DispatchOutputFormat": formats,
        "CombineInputFormat": formats,
        "CommStreamPool": Stub(get_stream_from_pool=lambda _: None),
        "QuantType": package.aiter.QuantType,
        "get_hip_quant": package.quantizer,
        "get_parallel": lambda: place,
        "get_is_extend_in_batch": lambda: True,
        "is_tbo_enabled": lambda: setting.case.two_batch_overlap,
        "fp8_dtype": fp8_dtype(setting.case.fp8_format),
        "_use_aiter": True,
        "_should_record_expert_distribution": lambda: False,
    }


def _modules(setting: Setting, package: Package) -> dict[str, Any]:
    """The import table of the lifted bodies."""
    small = Stub(smallm_moe_supported=lambda *_: False, SmallMMoeUnavailable=_SmallMoeUnavailable)
    combine_inputs = Stub(MoriEPNormalCombineInput=None, MoriEPLLCombineInput=None)
    return {
        "aiter": package.aiter,
        "aiter.fused_moe": Stub(fused_moe=package.fused_moe),
        "mori": Stub(ops=Stub(EpDispatchCombineKernelType=_KernelType)),
        "sglang.kernels.ops.moe": Stub(smallm_moe_gfx950=small),
        "sglang.kernels.ops.moe.moe_sorting_small": Stub(apply_aiter_small_moe_sort_patch=lambda: None),
        "sglang.kernels.ops.quantization.rocm_upscale": Stub(
            upscale=Unreached("upscale"), upscale_mxfp4=Unreached("upscale_mxfp4")
        ),
        "sglang.srt.layers.dp_attention": Stub(get_dp_global_num_tokens=lambda: _sender_rows(setting)),
        "sglang.srt.layers.moe.token_dispatcher.moriep": combine_inputs,
        "sglang.srt.layers.moe.token_dispatcher.deepep": Stub(
            DeepEPNormalCombineInput=Unreached("DeepEPNormalCombineInput"),
            DeepEPLLCombineInput=Unreached("DeepEPLLCombineInput"),
        ),
    }


def _sender_rows(setting: Setting) -> list[int] | None:
    """Tokens of each rank in the scheduler's metadata; a sub-batch has none.

    Source: `TboForwardBatchPreparer.filter_batch` of `batch_overlap/two_batch_overlap.py`, SGLang 0.5.23.
    """
    return None if setting.case.two_batch_overlap else list(setting.sender_rows)
