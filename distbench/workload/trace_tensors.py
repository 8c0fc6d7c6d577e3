"""Recorded hidden states of a slice of a trace: mapped from the file, and checked piece by piece. Needs no torch.

`hidden.STEP.LAYER` has the bits of the slice's tokens as they were dispatched, uint16 [n, H] of bf16 or uint8 [n, H] of
an fp8 format, which the metadata `hidden` names, and with fp8 `scales.STEP.LAYER`, float32 [n, H / 128].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distbench.errors import InvalidCase

BF16 = "bf16"
WORDS = {BF16: "U16", "e4m3fn": "U8", "e4m3fnuz": "U8"}
"""Type of safetensors that holds the bits of each format."""

BLOCK = 128
LARGEST = 20
"""Binary logarithm of the largest magnitude of a value; a token that is not all zeros has one of 2**-LARGEST or more.

Between the two no float32 of a layer overflows or loses bits, so that the bounds of errors hold (docs/gaussian.md).
A layer's hidden states are normalised before they are dispatched, and far from both.
"""

_NUMPY: dict[str, Any] = {"U16": np.uint16, "U8": np.uint8, "F32": np.float32}
_CHECKED = 1 << 22
_BF16_BITS, _BF16_BIAS, _BF16_SIGN = 7, 127, 0x8000
_FP8_BIAS = {"e4m3fn": 7, "e4m3fnuz": 8}


class Tensors(NamedTuple):
    """Hidden states of a slice's tokens in order: bits [., H] and scales float32 [., H / 128], in one or more parts."""

    kind: str
    parts: tuple[NDArray[Any], ...]
    scales: tuple[NDArray[np.float32], ...] = ()

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.parts[0].shape[1])

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.nbytes for part in (*self.parts, *self.scales))


def map_tensors(path: str, names: tuple[str, str], kind: str, shape: tuple[int, int]) -> Tensors:
    """Map the hidden states and scales that a safetensors file has by `names`: bits [n, H] of `shape`, not yet checked.

    Raises:
        InvalidCase: another dtype or shape than the format's.

    """
    described, start = _described(path)
    mapped: list[Any] = []
    shapes = [(names[0], WORDS[kind], list(shape))]
    if kind != BF16:
        shapes.append((names[1], "F32", [shape[0], shape[1] // BLOCK]))
    for name, word, wanted in shapes:
        one = described.get(name, {})
        if (one.get("dtype"), one.get("shape")) != (word, wanted):
            message = f"{path!r:.200}: {name} is {one.get('dtype')} {one.get('shape')}, the format has {word} {wanted}"
            raise InvalidCase(message)
        offset = start + one["data_offsets"][0]
        place: dict[str, Any] = {"dtype": _NUMPY[word], "shape": tuple(wanted)}
        mapped.append(np.memmap(path, mode="r", offset=offset, **place) if prod(wanted) else np.empty(**place))
    return Tensors(kind, (mapped[0],), tuple(mapped[1:]))


def bad_tensors(tensors: Tensors) -> str:
    """The first token whose hidden state no layer dispatches, as text; empty for none."""
    token = 0
    for bits, scales in pieces(tensors):
        most = _largest(tensors.kind, bits, scales)
        bad = ~((most <= 2.0**LARGEST) & ((most == 0) | (most >= 2.0**-LARGEST)))
        if bad.any():
            found = int(np.flatnonzero(bad)[0])
            return (
                f"token {token + found} has a hidden state of at most {most[found]:g}: allowed are finite ones with a "
                f"largest magnitude from 2^-{LARGEST} to 2^{LARGEST}, or of zeros alone"
            )
        token += len(bits)
    return ""


def pieces(tensors: Tensors) -> Iterator[tuple[NDArray[Any], NDArray[np.float32] | None]]:
    """Rows of bits and scales in order, a few MiB at a time."""
    for place, part in enumerate(tensors.parts):
        rows = max(_CHECKED // max(part.shape[1], 1), 1)
        for start in range(0, len(part), rows):
            scales = tensors.scales[place][start : start + rows] if tensors.scales else None
            yield part[start : start + rows], scales


def _largest(kind: str, bits: NDArray[Any], scales: NDArray[np.float32] | None) -> NDArray[Any]:
    """Largest magnitude of each row's values, float64 [n]; NaN or infinite where a value is, or a scale is negative."""
    if scales is None:
        magnitudes = (bits & (_BF16_SIGN - 1)).max(axis=1).astype(np.uint32)  # ordered as their bits are
        with np.errstate(invalid="ignore"):
            wide: NDArray[Any] = (magnitudes << 16).view(np.float32).astype(np.float64)
            return wide
    values = _fp8_magnitudes(kind)[bits].reshape(len(bits), -1, BLOCK).max(axis=2)
    with np.errstate(invalid="ignore", over="ignore"):
        found: NDArray[Any] = (values * np.where(scales >= 0, scales, np.nan)).max(axis=1)
    return found


def _fp8_magnitudes(kind: str) -> NDArray[np.float64]:
    """Magnitude of each of the 256 bit patterns, float64 [256]; NaN for a NaN."""
    codes = np.arange(256) & 0x7F
    exponents, fractions = codes >> 3, codes & 7
    normal = (8 + fractions) * 2.0 ** (exponents - _FP8_BIAS[kind] - 3)
    values = np.where(exponents == 0, fractions * 2.0 ** (1 - _FP8_BIAS[kind] - 3), normal)
    values[[0x7F, 0xFF] if kind == "e4m3fn" else [0x80]] = np.nan
    return values


def _described(path: str) -> tuple[dict[str, Any], int]:
    """Description of each tensor of a file that safetensors has opened, and the place of the first byte after it."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found: dict[str, Any] = json.loads(file.read(length))
    return found, 8 + length
