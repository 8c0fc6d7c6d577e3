"""Layers that a package's kernels do not support for any row count. Loads no torch."""

from __future__ import annotations

from typing import Literal

from distbench.errors import InvalidCase, Unsupported
from distbench.workload.exact_plan import BLOCK

TRITON_ALIGNMENT_BYTES = 16
"""The Triton experts load weight rows in multiples of this number of bytes."""
_SMALLEST_TILE = 64


def check_aiter_shape(hidden_size: int, intermediate_size: int, quant: Literal["bf16", "fp8"]) -> None:
    """Refuse a layer smaller than any tile of aiter's kernels, or not of whole blocks.

    Raises:
        InvalidCase: names the size and its required multiple.
    """
    least = BLOCK if quant == "fp8" else _SMALLEST_TILE
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size % least:
            message = (
                f"{name} = {size}: aiter takes {quant} weights in multiples of {least}; use {-(-size // least) * least}"
            )
            raise InvalidCase(message)


def check_triton_shape(hidden_size: int, intermediate_size: int, element_bytes: int) -> None:
    """Refuse a layer whose rows the Triton experts cannot load.

    Raises:
        Unsupported: names the size and its required multiple.
    """
    for name, width in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if width * element_bytes % TRITON_ALIGNMENT_BYTES:
            message = (
                f"experts triton: {name} = {width}: rows of {width * element_bytes} bytes; the kernels load multiples "
                f"of {TRITON_ALIGNMENT_BYTES} bytes, use a multiple of {TRITON_ALIGNMENT_BYTES // element_bytes}"
            )
            raise Unsupported(message)
