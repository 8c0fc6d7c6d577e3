"""Compiling many kernels side by side, into Triton's cache."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterable

import torch
from torch import Tensor

from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import ConfigSelector, KernelConfig, LayerShape
from distbench.experts.triton.trial import LocalExperts, run
from distbench.workload.batch import TokenBatch

_TRIED_ROWS = 64
_COMPILER: list[tuple[TritonExperts, LocalExperts, TokenBatch, Tensor]] = []


def compile_all(shape: LayerShape, configs: Iterable[KernelConfig], processes: int) -> None:
    """Compile the kernels of all configurations into Triton's cache, in processes side by side."""
    unique = list({(config.name1, config.name2): config for config in configs}.values())
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(unique)), _open_compiler, (shape,)) as pool:
        for _ in pool.imap_unordered(_compile, unique):
            pass


def _open_compiler(shape: LayerShape) -> None:
    local, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
    fp8 = shape.quant == "fp8"
    batch = TokenBatch(
        torch.empty(_TRIED_ROWS, hidden, device="cuda").to(torch.float8_e4m3fn if fp8 else torch.bfloat16),
        torch.empty(_TRIED_ROWS, hidden // 128, device="cuda") if fp8 else None,
        torch.empty(_TRIED_ROWS, shape.topk, device="cuda"),
        torch.zeros(_TRIED_ROWS, shape.topk, dtype=torch.int32, device="cuda"),
    )
    weights = LocalExperts(
        torch.zeros(local, 2 * inter, hidden, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(local, hidden, inter, dtype=torch.bfloat16, device="cuda"),
        torch.ones(shape.num_experts, dtype=torch.int32, device="cuda"),
    )
    nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
    _COMPILER.append((TritonExperts(ConfigSelector(shape=shape)), weights, batch, nothing))


def _compile(config: KernelConfig) -> None:
    with contextlib.suppress(Exception):  # the tuner meets it again, and says so
        run(*_COMPILER[0], config)
