"""What experts of another package are given: layers that they compute, and ids in their form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.experts.base import ExpertInput
from distbench.workload.exact_plan import BLOCK


def check_guest_layer(case: Case, name: str) -> None:
    """Refuse a layer that is more than SiLU(gate) * up, or whose fp8 blocks would lie across gate and up.

    Raises:
        Unsupported: names the first such key.
    """
    fp8 = case.dispatch_dtype == "fp8"
    asked = {
        f"activation {case.activation}": case.activation != "silu",
        f"swiglu_limit {case.swiglu_limit:g}": bool(case.swiglu_limit),
        "bias": case.bias,
        "doweight_stage1": case.doweight_stage1,
        f"fp8_format {case.fp8_format}": fp8 and case.fp8_format != "e4m3fn",
        f"intermediate_size {case.intermediate_size} with fp8": fp8 and bool(case.intermediate_size % BLOCK),
    }
    for what, is_so in asked.items():
        if is_so:
            message = (
                f"experts {name}: {what}: they are called for SiLU(gate) * up, in fp8 as e4m3fn with whole blocks of "
                f"{BLOCK} columns; use experts reference or aiter"
            )
            raise Unsupported(message)


def live_ids(given: ExpertInput, num_experts: int, absent: int) -> Tensor:
    """Return ids int32 [M, k] with `absent` in rows that are not live, and in place of an id of no expert.

    The number of live rows is read on the device, so that a CUDA graph can capture it.
    """
    live = torch.arange(given.rows, device=given.ids.device) < given.num_local_tokens
    known = live.unsqueeze(1) & (given.ids >= 0) & (given.ids < num_experts)
    return given.ids.where(known, absent)


def tile_name(config: Mapping[str, int]) -> str:
    """Return the configuration of a Triton kernel in a few words, with all that it names: `m64 n128 k64 g8 w4 s3`."""
    short = {"BLOCK_SIZE_M": "m", "BLOCK_SIZE_N": "n", "BLOCK_SIZE_K": "k", "GROUP_SIZE_M": "g"}
    short |= {"num_warps": "w", "num_stages": "s", "SPLIT_K": "split"}
    return " ".join(f"{short.get(name, f'{name} ')}{value}" for name, value in config.items())
