"""Checks of MoRI's arguments: its kernels take addresses, and check almost nothing."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.errors import DistbenchError, Unsupported
from distbench.transport.mori.config import SKIPS_NEGATIVE, MoriPlan
from distbench.utils.amd_arch import fp8_format
from distbench.workload.batch import TokenBatch
from distbench.workload.quantize import fp8_dtype

_FP4_ARCH = "gfx950"


def check_batch(batch: TokenBatch, case: Case, plan: MoriPlan, device: torch.device) -> None:
    """Refuse tensors that MoRI's kernels would misread, or write out of bounds with. Waits for the device.

    Raises:
        DistbenchError: names the tensor, its value and the bound.
    """
    tokens = batch.hidden.shape[0]
    scales = case.hidden_size // 128
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "hidden": (
            batch.hidden,
            (tokens, case.hidden_size),
            fp8_dtype(case.fp8_format) if case.dispatch_dtype == "fp8" else torch.bfloat16,
        ),
        "weights": (batch.weights, (tokens, case.topk_slots), torch.float32),
        "ids": (batch.ids, (tokens, case.topk_slots), torch.int32),
    }
    if case.dispatch_dtype == "fp8":
        wanted["scales"] = (batch.scales, (tokens, scales), torch.float32)
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            _refuse(f"{name} are missing; {plan.kernel} reads them")
        if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            _refuse(f"{name} are {tensor.dtype} {list(tensor.shape)}, MoRI reads them as {dtype} {list(shape)}")
        if not tensor.is_contiguous() or tensor.device != device:
            _refuse(f"{name} are strided {tensor.stride()} on {tensor.device}; make them contiguous on {device}")
    if tokens > case.max_dispatch_tokens_per_rank:
        _refuse(f"{tokens} tokens, max_dispatch_tokens_per_rank is {case.max_dispatch_tokens_per_rank}; raise it")
    _check_ids(batch.ids, case, plan)


def check_dropped(case: Case, plan: MoriPlan) -> None:
    """Refuse ids of -1 for a kernel that does not skip them.

    Raises:
        Unsupported: names the kernel and those that do.
    """
    if (case.dropped_slots or case.dropped_tokens) and plan.kernel not in SKIPS_NEGATIVE:
        message = (
            f"dropped_slots, dropped_tokens: {plan.kernel} of MoRI sends an id of -1 to rank 0; use IntraNode, "
            "IntraNodeLL or InterNodeV1, or drop the keys"
        )
        raise Unsupported(message)


def check_routing_is_own(ids: Tensor, routing: Tensor) -> None:
    """Refuse ids in combine other than those of dispatch: MoRI would silently sum other tokens' rows.

    Waits for the device.

    Raises:
        DistbenchError: names the first row that differs.
    """
    if ids.shape != routing.shape:
        _refuse_ids(f"have {ids.shape[0]} rows, this rank dispatched {routing.shape[0]} tokens")
    wrong = (ids != routing).any(1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        _refuse_ids(f"of token {row} are {ids[row].tolist()}, dispatched were {routing[row].tolist()}")


def check_device(case: Case, plan: MoriPlan, device: torch.device) -> None:
    """Refuse a plan that the device cannot run.

    Raises:
        Unsupported: an fp8 format other than the device's, for which no kernel is compiled; fp4 combine without
            device instructions for it; or more blocks than compute units.
    """
    arch = str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")).split(":")[0] or "unknown"
    own = fp8_format(arch)
    if case.uses_fp8 and case.fp8_format != own:
        message = f"fp8_format = {case.fp8_format}: MoRI's kernels for {device}, {arch}, have {own} only; use that"
        raise Unsupported(message)
    if plan.quant == "fp4_blockwise" and arch != _FP4_ARCH:
        message = (
            f"combine_quant = fp4_blockwise: MoRI has it on {_FP4_ARCH} only, {device} is {arch}; use fp8_blockwise"
        )
        raise Unsupported(message)
    if plan.launch_mode == "MANUAL":
        excess = excess_blocks(plan.launch.blocks, device)
        if excess:
            raise Unsupported(excess)


def compute_units_of(device: torch.device) -> int:
    """Compute units of a device, by which SGLang clamps a grid."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def excess_blocks(blocks: int, device: torch.device) -> str:
    """Return why a grid would hang: blocks that wait for each other but cannot all run at once; or "" if it is safe."""
    units = compute_units_of(device)
    return f"mori: {blocks} blocks have to run at once, {device} has {units} compute units" if blocks > units else ""


def _check_ids(ids: Tensor, case: Case, plan: MoriPlan) -> None:
    if not ids.numel():
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 and plan.kernel not in SKIPS_NEGATIVE:
        _refuse(f"id {least}: {plan.kernel} sends a negative id to rank 0; use IntraNode, IntraNodeLL or InterNodeV1")
    if most >= case.placed_experts:
        _refuse(
            f"id {most}: the last expert is {case.placed_experts - 1}, and {plan.kernel} drops such a slot or ends the "
            "process; correct the ids"
        )


def _refuse(reason: str) -> NoReturn:
    message = f"dispatch: {reason}"
    raise DistbenchError(message)


def _refuse_ids(reason: str) -> NoReturn:
    message = f"combine: ids {reason}; pass the rank's own routing, not the ids that dispatch returned"
    raise DistbenchError(message)
