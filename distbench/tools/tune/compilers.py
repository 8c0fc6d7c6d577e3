"""Parallel compilation of kernels into Triton's cache."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from distbench.errors import Unsupported
from distbench.experts.base import ExpertWeights
from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import ConfigSelector, KernelConfig, LayerShape
from distbench.tools.tune.trial import run
from distbench.utils.text import one_line
from distbench.workload.batch import TokenBatch

_TRIED_ROWS = 64
# Memory for a CUDA context, its loaded kernels, and the peak of quantising one matrix.
_CONTEXT_BYTES = 1 << 30
_Compiler = tuple[TritonExperts, ExpertWeights, TokenBatch, Tensor]
_COMPILER: list[_Compiler] = []
_REFUSED: list[str] = []


def compile_all(
    shape: LayerShape, configs: Iterable[KernelConfig], processes: int, note: Callable[[str, int, int], None]
) -> None:
    """Compile the kernels of all configurations into Triton's cache, in as many processes as the device has room for.

    `note` receives the work, done and total.

    Raises:
        Unsupported: there is no room, or a process could not make its inputs.
    """
    unique = list({(config.name1, config.name2): config for config in configs}.values())
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(unique), _fitting(shape)), _open_compiler, (shape,)) as pool:
        for done, _ in enumerate(pool.imap_unordered(_compile, unique), 1):
            note("compiling kernels", done, len(unique))


def _fitting(shape: LayerShape) -> int:
    """Return the number of compilers that fit the device: each holds the layer's weights, for fp8 in both types."""
    elements = 3 * shape.num_local_experts * shape.hidden_size * shape.intermediate_size
    needed = elements * (3 if shape.quant == "fp8" else 2) + _CONTEXT_BYTES
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        message = (
            f"tune: a compiler needs about {needed} bytes of the GPU ({needed / 2**30:.1f} GiB), {free} are free; stop "
            "other processes there, or tune for a larger --ep-size"
        )
        raise Unsupported(message)
    return free // needed


def _open_compiler(shape: LayerShape) -> None:
    """Make the inputs of this process; an error raised here would make the pool start others forever."""
    try:
        _COMPILER.append(_make_compiler(shape))
    except Exception as error:  # noqa: BLE001 - `_compile` reports it
        _REFUSED.append(one_line(error))


def _make_compiler(shape: LayerShape) -> _Compiler:
    local, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
    fp8 = shape.quant == "fp8"
    batch = TokenBatch(
        torch.empty(_TRIED_ROWS, hidden, device="cuda").to(torch.float8_e4m3fn if fp8 else torch.bfloat16),
        torch.empty(_TRIED_ROWS, hidden // 128, device="cuda") if fp8 else None,
        torch.empty(_TRIED_ROWS, shape.topk, device="cuda"),
        torch.zeros(_TRIED_ROWS, shape.topk, dtype=torch.int32, device="cuda"),
    )
    weights = ExpertWeights(
        torch.zeros(local, 2 * inter, hidden, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(local, hidden, inter, dtype=torch.bfloat16, device="cuda"),
        torch.ones(shape.num_experts, dtype=torch.int32, device="cuda"),
    )
    nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
    return TritonExperts(ConfigSelector(shape=shape)), weights, batch, nothing


def _compile(config: KernelConfig) -> None:
    if _REFUSED:
        message = (
            f"tune: a compiler cannot start ({_REFUSED[0]}); lower --processes, or stop other processes on the GPU"
        )
        raise Unsupported(message)
    with contextlib.suppress(Exception):  # the tuner meets it again and reports it
        run(*_COMPILER[0], config)
