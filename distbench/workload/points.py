"""Numbers of the probes: points where SiLU is far enough from a rounding boundary. Loads no torch.

SiLU at each point is at least 2**-5 of a bf16 ulp away from a boundary. An error of 2**-13 of an ulp, and so any
implementation of the exponential, changes no bit; other activations do. tests/unit/workload/test_points.py repeats the
search for the points. Where values are rounded to e4m3 (`coarse`), points are away from its boundaries too, before and
after a rounding to bf16.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from distbench.utils.amd_arch import Fp8Format

# An output reads a row by a mantissa that makes the product round in bf16 as well, which exposes truncation.
_UP_GATES = ((-1.5, 1.25), (-0.625, 1.25), (1.0, 1.25), (1.75, 1.25), (3.0, 1.25), (5.5, 1.25), (7.5, 1.5))
# The only point that exposes a clamp of the gate; it is too large for e4m3.
_LARGE_GATE = (96.0, 1.0)
# Values from 1 to 2 of eight significant bits, in 128ths.
_MANTISSAS = (
    *(129, 131, 135, 137, 139, 141, 145, 147, 151, 153, 155, 157, 161, 171, 173, 177, 181, 193),
    *(199, 201, 203, 209, 211, 213, 219, 221, 223, 225, 227, 233, 235, 239, 241, 243, 247, 249),
)
# Wide columns are one of these mantissas times 2**0 to 2**4.
WIDE_POWERS = 5
# Coefficients of a payload in whole steps: the number of 2s, then of 1s.
_FINE_ENTRIES, _COARSE_ENTRIES = (2, 15), (1, 7)
UP_ENTRIES = 6
HOT_GATE = 64.0


class Points(msgspec.Struct, frozen=True, kw_only=True):
    """Values of gates, up values and wide columns.

    A gate's payload is `step` times an integer of at most `largest`, made of `doubled` entries of 2 and `single`
    entries of 1. `up_gates` are gates that switch an up payload of integers, `wide_up_gates` those that switch a wide
    column; each comes with the magnitude of the output weight that reads it. `wide` are the mantissas of wide columns,
    in 128ths; a gate reads them in steps of `wide_step`.
    """

    step: float
    doubled: int
    single: int
    up_gates: tuple[tuple[float, float], ...]
    wide_up_gates: tuple[tuple[float, float], ...]
    wide: tuple[int, ...]
    wide_step: float

    @property
    def largest(self) -> int:
        """The largest integer of a gate's payload."""
        return 2 * self.doubled + self.single


@lru_cache(maxsize=8)
def points_for(*, coarse: bool, fp8: Fp8Format | None) -> Points:
    """Return the points of a layer; `fp8` is the format of hidden states in transit, None for bf16."""
    doubled, single = _COARSE_ENTRIES if coarse else _FINE_ENTRIES
    wide_gates: tuple[tuple[float, float], ...] = ((-0.8125, 1.0), (-0.625, 1.0), (-1.5, 1.0), (1.75, 1.0))
    wide: tuple[int, ...] = _MANTISSAS
    wide_step = 2.0**-5
    if fp8 == "e4m3fn":
        wide_gates = ((-1.5, 1.25), (-0.625, 1.25), (0.625, 1.0), (1.0, 1.25))
        wide, wide_step = (224,), 2.0**-1
    elif fp8 is not None:
        wide_gates = ((-1.5, 1.25), (-0.625, 1.25), (0.625, 1.25), (1.0, 1.25))
        wide = (240,)
    return Points(
        step=0.375 if coarse else 0.40625,
        doubled=doubled,
        single=single,
        up_gates=_UP_GATES if coarse or fp8 else (*_UP_GATES, _LARGE_GATE),
        wide_up_gates=wide_gates,
        wide=wide,
        wide_step=wide_step,
    )
