"""The interface of `fused_moe` over the Triton kernels."""

from __future__ import annotations

import importlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.experts.base import ExpertInput, Experts, ExpertsContext, ExpertWeights
from distbench.experts.once_per_node import first_on_node
from distbench.experts.quantized_weights import Quantized, QuantizedWeights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.triton.config import ConfigSelector, KernelConfig
from distbench.experts.triton.table import selector_for
from distbench.utils.devices import interpreted
from distbench.workload.exact_plan import BLOCK


def make_triton_experts(case: Case) -> TritonExperts:
    """Return the case's experts for the current device, which selects the table.

    Raises:
        InvalidCase: its kernel_table cannot be read.
        Unsupported: see `TritonExperts`.
    """
    _check_triton()
    device = "" if interpreted() else torch.cuda.get_device_name()
    return TritonExperts(selector_for(case, device))


class TritonExperts(Experts):
    """Triton experts; see `Experts` for the contract. No call waits for the device; CUDA graphs can capture any call.

    With float8 rows the bf16 weights are quantised once, until they change; weights made in inference mode count as
    unchanged.
    """

    def __init__(self, selector: ConfigSelector) -> None:
        """Choose kernels with `selector`.

        Raises:
            Unsupported: Triton is missing, or no device runs its kernels; the message names what to install.

        """
        _check_triton()
        self._selector = selector
        self._quantized = QuantizedWeights()
        self._configs: dict[int, KernelConfig] = {}

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`."""
        return self._selector.choose(rows)

    def warm_up(self, weights: ExpertWeights, rows: tuple[int, ...]) -> None:
        """See `Experts.warm_up`; interpreted kernels are not compiled."""
        if interpreted():
            return
        for count in sorted(set(rows)):
            name = f"{_build_name(weights.w1.device)}-{count}-{self._selector.shape}-{self._selector.config(count)}"
            first_on_node(_cache_folder(), name, partial(self._empty_call, weights, count))

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`."""
        rows = given.rows
        if rows not in self._configs:
            self._configs[rows] = self._selector.config(rows)
        return self.run(self._configs[rows], given, weights)

    def run(
        self, config: KernelConfig, given: ExpertInput, weights: ExpertWeights, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """Make the call with given kernels, for tuning, and with a result of `dtype`."""
        launch = _launch()
        w1, w2 = weights.w1, weights.w2
        if given.scales is None:
            held = launch.Weights(w1, w2, None, None, weights.mask)
        else:
            held = launch.Weights(*self.quantized(w1, w2), weights.mask)
        made: Tensor = launch.compute(given, held, config, dtype)
        return made

    def quantized(self, w1: Tensor, w2: Tensor) -> Quantized:
        """Return both weights as float8, and their scales."""
        return self._quantized.of(w1, w2)

    def _empty_call(self, weights: ExpertWeights, rows: int) -> None:
        """Call with `rows` rows, none of them live: Triton compiles by shape, and computes nothing."""
        shape, like = self._selector.shape, weights.w1
        fp8 = shape.quant == "fp8"
        given = ExpertInput(
            hidden=like.new_zeros(rows, shape.hidden_size).to(torch.float8_e4m3fn if fp8 else torch.bfloat16),
            scales=like.new_ones(rows, shape.hidden_size // BLOCK, dtype=torch.float32) if fp8 else None,
            weights=like.new_zeros(rows, shape.topk, dtype=torch.float32),
            ids=like.new_zeros(rows, shape.topk, dtype=torch.int32),
            num_local_tokens=like.new_zeros(1, dtype=torch.int32),
        )
        self(given, weights)


def _check_triton() -> None:
    try:
        from triton.tools import tensor_descriptor  # noqa: F401
    except ImportError as error:
        message = f"experts triton: Triton cannot be imported ({error}); install triton>=3.6 next to torch"
        raise Unsupported(message) from error
    if not interpreted() and not torch.cuda.is_available():
        message = "experts triton: torch sees no GPU; use one, or set TRITON_INTERPRET=1 for tiny shapes on the CPU"
        raise Unsupported(message)


def _cache_folder() -> Path:
    """Return Triton's cache folder."""
    import triton

    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build_name(device: torch.device) -> str:
    """Return a key of a build: the facts that decide it besides layer and choice."""
    import triton

    return f"triton-{triton.__version__}-{torch.cuda.get_device_name(device)}"


@lru_cache(maxsize=1)
def _launch() -> Any:
    """Return the module of the launches, which loads Triton."""
    return importlib.import_module("distbench.experts.triton.launch")


def make(context: ExpertsContext) -> TritonExperts:
    """Return the experts of a case; see `make_triton_experts`."""
    return make_triton_experts(context.case)


PLUGIN = Plugin(make=make, name="triton", graphs=True)
