"""Checks of the arguments of `fused_moe`, of which aiter itself checks almost none.

A rank that meets a bad argument ends: its peers are in the middle of a pass and do not know of it.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.errors import DistbenchError, Unsupported
from distbench.workload.exact_plan import BLOCK


def check_arguments(  # noqa: PLR0913 - the arguments of the call
    hidden: Tensor, weights: Tensor, ids: Tensor, mask: Tensor, scale: Tensor | None, weight_scale: Tensor | None
) -> None:
    """Refuse arguments that aiter accepts silently and computes garbage from.

    Raises:
        DistbenchError: types, shapes or layouts other than those of `Experts`.
    """
    rows = hidden.shape[0]
    for name, tensor, dtype in (
        ("topk_ids", ids, torch.int32),
        ("topk_weight", weights, torch.float32),
        ("expert_mask", mask, torch.int32),
    ):
        if tensor.dtype != dtype:
            _refuse(f"{name} is {tensor.dtype}: {dtype} is what the sort reads")
        if not tensor.is_contiguous():
            _refuse(f"{name} is not contiguous: kernels read its rows as contiguous")
    for name, length in (("topk_ids", ids.shape[0]), ("topk_weight", weights.shape[0])):
        if length != rows:
            _refuse(
                f"{name} has {length} rows, hidden_states {rows}: both select the kernel, so cut both to the same rows"
            )
    if (scale is None) != (hidden.element_size() > 1) or (scale is None) != (weight_scale is None):
        _refuse(f"hidden_states is {hidden.dtype}: float8 goes with a1_scale and quantised weights, bf16 with neither")
    if scale is not None and scale.shape != (rows, hidden.shape[1] // BLOCK):
        _refuse(f"a1_scale is {list(scale.shape)}: {[rows, hidden.shape[1] // BLOCK]} goes with hidden_states")


def check_ids(ids: Tensor, num_experts: int) -> None:
    """Refuse ids of no expert in valid rows: aiter would read out of bounds. Waits for the device.

    Raises:
        DistbenchError: names the first such id.
    """
    wild = ids[(ids < 0) | (ids >= num_experts)]
    if wild.numel():
        _refuse(f"topk_ids holds {int(wild[0])} in a valid row: allowed is 0 to {num_experts - 1}")


def check_dropped(case: Case) -> None:
    """Refuse a case whose tokens have ids of -1: aiter's sorter would read its mask at them.

    Raises:
        Unsupported: says what production does instead.
    """
    if case.dropped_slots or case.dropped_tokens:
        message = (
            "dropped_slots, dropped_tokens: aiter's sorter reads expert_mask at each id, and -1 is out of bounds; on "
            "ROCm SGLang gives such tokens expert 0 with weight 0. Use experts reference or triton, or drop the keys"
        )
        raise Unsupported(message)


def check_live(live: int, rows: int) -> None:
    """Refuse more valid rows than there are rows: aiter would write out of bounds.

    Raises:
        DistbenchError: names both numbers.
    """
    if live > rows:
        _refuse(f"num_local_tokens = {live}: at most {rows}, the rows of hidden_states")


def _refuse(reason: str) -> NoReturn:
    message = f"aiter's fused_moe: {reason}"
    raise DistbenchError(message)
