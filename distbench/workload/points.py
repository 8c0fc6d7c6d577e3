"""Numbers of the probes: points where the activation is far enough from a rounding boundary. Loads no torch.

The activation at each point is at least 2**-5 of a bf16 ulp away from a boundary. An error of 2**-13 of an ulp, and so
any implementation of the exponential, changes no bit; other activations do. tests/unit/workload/test_points.py repeats
the search for the points. Where values are rounded to e4m3 (`coarse`), points are away from its boundaries too, before
and after a rounding to bf16. Gelu's points end at -3: below, a float32 of 1 + erf(x) is too inexact.
"""

from __future__ import annotations

import math
from functools import lru_cache

import msgspec

from distbench.utils.amd_arch import Fp8Format
from distbench.workload.formula import SWIGLU_ALPHA, Formula

# An output reads a row by a mantissa that makes the product round in bf16 as well, which exposes truncation.
_UP_GATES = ((-1.5, 1.25), (-0.625, 1.25), (1.0, 1.25), (1.75, 1.25), (3.0, 1.25), (5.5, 1.25), (7.5, 1.5))
# The only point that exposes a clamp of the gate; it is too large for e4m3.
_LARGE_GATE = (96.0, 1.0)
# Values from 1 to 2 of eight significant bits, in 128ths.
_MANTISSAS = (
    *(129, 131, 135, 137, 139, 141, 145, 147, 151, 153, 155, 157, 161, 171, 173, 177, 181, 193),
    *(199, 201, 203, 209, 211, 213, 219, 221, 223, 225, 227, 233, 235, 239, 241, 243, 247, 249),
)
_GELU_UP_GATES = ((-1.5, 1.5), (-0.875, 1.25), (0.5, 1.25), (1.5, 1.0), (1.75, 1.0), (3.0, 1.25), (5.5, 1.5))
_GELU_MANTISSAS = (
    *(131, 133, 135, 137, 141, 143, 145, 147, 151, 153, 155, 157, 159, 161, 163, 165, 167, 169, 171, 173, 175, 177),
    *(179, 181, 201, 203, 207, 211, 213, 217, 219, 223, 225, 227, 231, 235, 237, 239, 241, 247, 249, 251, 253, 255),
)
_SWIGLU_MANTISSAS = (
    *(129, 131, 145, 179, 181, 183, 185, 191, 193, 195, 197, 201),
    *(207, 209, 211, 215, 219, 223, 227, 235, 237, 243, 249, 251),
)
# Wide columns are one of these mantissas times 2**0 to 2**4.
WIDE_POWERS = 5
# Coefficients of a payload in whole steps: the number of 2s, then of 1s.
_FINE_ENTRIES, _COARSE_ENTRIES = (2, 15), (1, 7)
UP_ENTRIES = 6
HOT_GATE = 64.0
# The largest bias of a gate, in steps.
GATE_BIAS = 2
_BF16_BITS = 8
_LEAST_MARGIN = 2.0**-5


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
    bias: int = 0
    """Largest integer, in steps, of a bias added to a payload."""

    @property
    def largest(self) -> int:
        """The largest integer of a gate's payload, with its bias."""
        return 2 * self.doubled + self.single + self.bias


_PLAIN = Formula()


@lru_cache(maxsize=8)
def points_for(*, coarse: bool, fp8: Fp8Format | None, formula: Formula = _PLAIN) -> Points:
    """Return the points of a layer; `fp8` is the format of hidden states in transit, None for bf16."""
    if halves_are_certain(formula, coarse=coarse, fp8=fp8):
        return _halved_points(gelu=formula.activation == "gelu")
    if formula.activation == "swiglu":
        points = _swiglu_points()
    else:
        points = (_gelu_points if formula.activation == "gelu" else _silu_points)(coarse=coarse, fp8=fp8)
    if not formula.bias:
        return points
    return msgspec.structs.replace(points, single=points.single - GATE_BIAS, bias=GATE_BIAS)


def halves_are_certain(formula: Formula, *, coarse: bool, fp8: Fp8Format | None) -> bool:
    """Whether a layer that weighs first has points whose halves are points too, for routing weights of 1 and 1/2."""
    return formula.weigh_first and not (formula.limit or formula.bias or coarse or fp8)


def _halved_points(*, gelu: bool) -> Points:
    """Return points for bf16 that keep their margin when they are halved."""
    if gelu:
        return Points(
            step=0.171875,
            doubled=1,
            single=6,
            up_gates=((-0.875, 1.0), (0.625, 1.0), (3.0, 1.0), (3.5, 1.0), (6.5, 1.5), (96.0, 1.25)),
            wide_up_gates=((7.0, 1.0), (7.5, 1.0), (-1.5, 1.0)),
            wide=(
                *(131, 133, 135, 141, 143, 151, 153, 159, 163, 165, 167, 173, 175, 177, 181),
                *(201, 203, 207, 211, 213, 223, 225, 227, 231, 235, 241, 247, 251, 253, 255),
            ),
            wide_step=2.0**-5,
        )
    return Points(
        step=0.28125,
        doubled=2,
        single=11,
        up_gates=((-0.875, 1.0), (0.625, 1.0), (3.5, 1.25), (6.5, 1.0), (7.0, 1.25), (96.0, 1.25)),
        wide_up_gates=((16.0, 1.25), (1.75, 1.0), (-0.5, 1.0)),
        wide=(
            *(129, 131, 133, 135, 137, 139, 141, 145, 153, 155, 161, 167, 171, 193),
            *(199, 201, 207, 209, 211, 219, 223, 225, 227, 233, 235, 241, 249),
        ),
        wide_step=2.0**-5,
    )


def _silu_points(*, coarse: bool, fp8: Fp8Format | None) -> Points:
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


def _gelu_points(*, coarse: bool, fp8: Fp8Format | None) -> Points:
    wide_gates: tuple[tuple[float, float], ...] = ((-0.875, 1.0), (3.5, 1.0), (4.0, 1.25), (7.0, 1.0))
    wide: tuple[int, ...] = _GELU_MANTISSAS
    wide_step = 2.0**-5
    if fp8 == "e4m3fn":
        wide_gates = ((-1.125, 1.25), (-0.875, 1.75), (0.5, 1.25), (0.8125, 1.25))
        wide, wide_step = (224,), 2.0**-1
    elif fp8 is not None:
        wide_gates = ((-1.5, 1.5), (-1.125, 1.25), (-0.875, 1.25), (-0.75, 1.25))
        wide = (240,)
    return Points(
        step=0.34375 if coarse else 0.171875,
        doubled=1 if coarse else 2,
        single=3 if coarse else 11,
        up_gates=_GELU_UP_GATES if coarse or fp8 else (*_GELU_UP_GATES, (96.0, 1.25)),
        wide_up_gates=wide_gates,
        wide=wide,
        wide_step=wide_step,
    )


def _swiglu_points() -> Points:
    """Return points for bf16; 8 and 96 are above the limit, and so are wide columns from 8 on."""
    return Points(
        step=0.203125,
        doubled=2,
        single=13,
        up_gates=(
            *((-1.25, 1.0), (1.125, 1.0), (2.0, 1.0), (3.0, 1.25), (4.5, 1.5), (5.5, 1.5)),
            *((8.0, 1.25), (96.0, 1.25)),
        ),
        wide_up_gates=((5.5, 1.0), (6.5, 1.0), (-1.125, 1.0)),
        wide=_SWIGLU_MANTISSAS,
        wide_step=2.0**-5,
    )


def certain_at_limit(formula: Formula) -> bool:
    """Whether all right kernels round the products alike that a clamped gate or up value gives."""
    points, limit, shift = points_for(coarse=False, fp8=None, formula=formula), formula.limit, formula.up_shift
    gates = [weight for gate, weight in points.up_gates if gate > limit]
    clamped = [(limit, weight, up + shift) for weight in gates for up in range(-UP_ENTRIES, UP_ENTRIES + 1)]
    wide = [(gate, weight, up + shift) for gate, weight in points.wide_up_gates for up in (-limit, limit)]
    return all(_certain(_activation(gate, formula), weight, up) for gate, weight, up in (*clamped, *wide) if up)


def _certain(activation: float, weight: float, up: float) -> bool:
    """Whether products round alike with and without a rounding of the activation, and of the row that is read."""
    once, twice = activation * up, _rounded(activation) * up
    return (
        _rounded(once) == _rounded(twice)
        and _rounded(weight * once) == _rounded(weight * _rounded(once))
        and min(_margin(once), _margin(weight * once)) >= _LEAST_MARGIN
        and min(_margin(twice), _margin(weight * _rounded(once))) > 0
    )


def _activation(gate: float, formula: Formula) -> float:
    """Return the activation of a gate within the limit, without up."""
    if formula.activation == "gelu":
        return gate * math.erfc(-gate / math.sqrt(2)) / 2
    return gate / (1 + math.exp(-gate * (SWIGLU_ALPHA if formula.activation == "swiglu" else 1)))


def _rounded(value: float) -> float:
    """Return the nearest number of bf16's significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, _BF16_BITS)), exponent - _BF16_BITS)


def _margin(value: float) -> float:
    """Return the distance from a tie between two numbers of bf16, in its steps."""
    return abs(math.ldexp(abs(math.frexp(value)[0]), _BF16_BITS) % 1 - 0.5)
