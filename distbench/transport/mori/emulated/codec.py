"""Formats of expert rows on the trip back: plain, cast to fp8, or in scaled blocks of fp8 or fp4."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from distbench.transport.mori.emulated import quirks
from distbench.workload.quantize import fp8_dtype, saturated

FP4_MAX = 6.0

_BLOCKS_VARIABLE = "MORI_FP8_COMBINE_SCALE_DIM"
_DEFAULT_BLOCKS = 56
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Ties between two values go to the even code: the lower one for these, the upper one for the others.
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


class Codec(Protocol):
    """Encoding of rows [m, H] in transit, and their addition to a float32 sum."""

    def pack(self, rows: Tensor) -> Tensor:
        """Return rows as bytes: uint8 [m, width]."""

    def width(self, columns: int) -> int:
        """Return the bytes per row."""

    def add(self, total: Tensor, packed: Tensor) -> Tensor:
        """Return float32 total [m, H] plus packed rows uint8 [m, width]."""

    def round(self, total: Tensor) -> Tensor:
        """Return the values of a node's float32 sum after its trip to the next node, as float32."""


def of_its_own(columns: Tensor) -> Tensor:
    """Copy columns [m, c] of byte rows, so that they can be viewed as a wider type.

    `contiguous()` does not copy a single row, which may start at an odd address that a view refuses.
    """
    return columns.clone(memory_format=torch.contiguous_format)


class Plain:
    """Rows in their own dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def pack(self, rows: Tensor) -> Tensor:
        """See `Codec.pack`."""
        return rows.contiguous().view(torch.uint8)

    def width(self, columns: int) -> int:
        """See `Codec.width`."""
        return columns * self._dtype.itemsize

    def add(self, total: Tensor, packed: Tensor) -> Tensor:
        """See `Codec.add`."""
        return total + packed.view(self._dtype).float()

    def round(self, total: Tensor) -> Tensor:
        """See `Codec.round`."""
        return total.to(self._dtype).float()


class DirectCast:
    """fp8_direct_cast: the device's e4m3, saturating, no scale."""

    def __init__(self, fp8: torch.dtype | None = None) -> None:
        self._fp8 = fp8 or fp8_dtype(quirks.fp8_format())

    def pack(self, rows: Tensor) -> Tensor:
        """See `Codec.pack`."""
        return saturated(rows.float(), self._fp8).view(torch.uint8)

    def width(self, columns: int) -> int:
        """See `Codec.width`."""
        return columns

    def add(self, total: Tensor, packed: Tensor) -> Tensor:
        """See `Codec.add`."""
        return total + packed.view(self._fp8).float()

    def round(self, total: Tensor) -> Tensor:
        """See `Codec.round`."""
        return saturated(total, self._fp8).float()


class Fp8Blockwise:
    """fp8_blockwise: blocks above the largest number of the device's e4m3 are scaled down to it; scales follow."""

    def __init__(self, columns: int, fp8: torch.dtype | None = None) -> None:
        self._fp8 = fp8 or fp8_dtype(quirks.fp8_format())
        self.blocks = int(os.environ.get(_BLOCKS_VARIABLE, _DEFAULT_BLOCKS))
        self._columns = columns
        self._block = -(-columns // self.blocks)

    def pack(self, rows: Tensor) -> Tensor:
        """See `Codec.pack`; the first scale is negated if any block of the row was scaled."""
        blocks = self._blocked(rows.float())
        amax = blocks.abs().nan_to_num(0.0, posinf=float("inf")).amax(2)
        scaled, scales, factors = self._scales(amax)
        values = (blocks * factors.unsqueeze(2)).flatten(1)[:, : self._columns]
        scales[:, 0] = torch.where(scaled.any(1), -scales[:, 0], scales[:, 0])
        return torch.cat([self._encode(values), scales.contiguous().view(torch.uint8)], dim=1)

    def width(self, columns: int) -> int:
        """See `Codec.width`."""
        return self._payload(columns) + 4 * self.blocks

    def add(self, total: Tensor, packed: Tensor) -> Tensor:
        """See `Codec.add`: one rounding for product and sum, or a plain sum if nothing was scaled."""
        payload = self._payload(self._columns)
        scales = of_its_own(packed[:, payload:]).view(torch.float32)
        values = self._blocked(self._decode(of_its_own(packed[:, :payload])))
        wide = (values.double() * scales.abs().double().unsqueeze(2)).flatten(1)[:, : self._columns]
        plain = values.flatten(1)[:, : self._columns]
        return torch.where(scales[:, :1] < 0, (total.double() + wide).float(), total + plain)

    def round(self, total: Tensor) -> Tensor:
        """See `Codec.round`; two-level kernels refuse blocks."""
        return total

    def _scales(self, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether each block [m, blocks] is scaled, the stored scale, and the applied factor."""
        maximum = torch.full_like(amax, torch.finfo(self._fp8).max)
        scaled = amax > maximum
        inverse = torch.ones_like(amax) / maximum
        return scaled, torch.where(scaled, amax * inverse, 1.0), torch.where(scaled, maximum / amax, 1.0)

    def _encode(self, values: Tensor) -> Tensor:
        return saturated(values, self._fp8).view(torch.uint8)

    def _decode(self, payload: Tensor) -> Tensor:
        return payload.view(self._fp8).float()

    def _payload(self, columns: int) -> int:
        return columns

    def _blocked(self, values: Tensor) -> Tensor:
        padding = self.blocks * self._block - values.shape[1]
        return torch.nn.functional.pad(values, (0, padding)).view(-1, self.blocks, self._block)


class Fp4Blockwise(Fp8Blockwise):
    """fp4_blockwise: E2M1, two per byte, every block scaled."""

    def _scales(self, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maximum = torch.full_like(amax, FP4_MAX)
        nothing = amax == 0
        return (
            torch.ones_like(nothing),
            torch.where(nothing, 1.0, amax / maximum),
            torch.where(nothing, 1.0, maximum / amax),
        )

    def _encode(self, values: Tensor) -> Tensor:
        size = values.abs()
        above = [size > tie for tie in _TIES_DOWN] + [size >= tie for tie in _TIES_UP]
        codes = torch.stack(above).sum(0, dtype=torch.uint8)
        codes |= values.signbit().to(torch.uint8) << 3
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        return codes[:, ::2] | (codes[:, 1::2] << 4)

    def _decode(self, payload: Tensor) -> Tensor:
        codes = torch.stack([payload & 15, payload >> 4], dim=2).flatten(1)[:, : self._columns].long()
        sizes = torch.tensor(_FP4_VALUES, device=payload.device)[codes & 7]
        return torch.where(codes >= 8, -sizes, sizes)  # noqa: PLR2004 - the sign bit

    def _payload(self, columns: int) -> int:
        return -(-columns // 2)


def make_codec(
    quant_type: str, dtype: torch.dtype, columns: int, *, external: bool, fp8: torch.dtype | None = None
) -> Codec:
    """Return the codec of rows of `dtype`; a direct cast is silently dropped for other dtypes and without a copy.

    `fp8` is the device's fp8 type; None for that of the imitated device.
    """
    if quant_type == "fp8_direct_cast" and dtype is torch.bfloat16 and external:
        return DirectCast(fp8)
    blockwise: dict[str, Any] = {"fp8_blockwise": Fp8Blockwise, "fp4_blockwise": Fp4Blockwise}
    return blockwise[quant_type](columns, fp8) if quant_type in blockwise else Plain(dtype)


def combine_row_bytes(quant_type: str, columns: int, payload: int) -> int:
    """Return the allotted bytes of a blockwise row; fp8 takes those of an unquantised row, and the scales."""
    codec = Fp4Blockwise(columns) if quant_type == "fp4_blockwise" else Fp8Blockwise(columns)
    return codec.width(columns) if isinstance(codec, Fp4Blockwise) else payload + 4 * codec.blocks
