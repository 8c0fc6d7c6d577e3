"""Probe points: their distance from rounding ties, and an exhaustive search that finds no better step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distbench.utils.amd_arch import Fp8Format
from distbench.workload.activation import activate
from distbench.workload.exact_plan import plan_exact
from distbench.workload.formula import Formula
from distbench.workload.points import UP_ENTRIES, WIDE_POWERS, Points, halves_are_certain, points_for
from distbench.workload.probes import row_values

BF16, E4M3 = 8, 4
MARGIN = 2.0**-5
FORMATS: list[Fp8Format | None] = [None, "e4m3fn", "e4m3fnuz"]


def margin(values: Tensor, bits: int = BF16) -> float:
    """Least distance of float64 values from a rounding tie at `bits` significant bits, in ulps."""
    sizes = values[values != 0].abs()
    steps = sizes / torch.ldexp(torch.ones_like(sizes), torch.frexp(sizes).exponent - bits)
    return float((steps.frac() - 0.5).abs().min())


def silu(values: Tensor) -> Tensor:
    return values * torch.sigmoid(values)


def rounded(values: Tensor) -> Tensor:
    return values.bfloat16().double()


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right)


def odd_part(value: float) -> int:
    whole = round(abs(value) * 2**20)
    return whole // (whole & -whole)


def payload(points: Points) -> Tensor:
    whole = torch.arange(-points.largest, points.largest + 1).double()
    return whole[whole != 0] * points.step


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("coarse", [False, True])
def test_gates_of_payloads_keep_their_margin_to_rounding_ties(fp8: Fp8Format | None, coarse: bool) -> None:
    points = points_for(coarse=coarse, fp8=fp8)
    gates = payload(points)
    assert margin(silu(gates)) >= MARGIN
    assert odd_part(points.step) <= 15
    assert points.largest * odd_part(points.step) <= 256
    assert same(rounded(gates), gates)
    if coarse:
        assert margin(silu(gates), E4M3) >= 0.02
        assert margin(rounded(silu(gates)), E4M3) > 0


@pytest.mark.parametrize(("coarse", "largest"), [(False, 19), (True, 9)])
def test_exhaustive_search_finds_no_step_with_a_larger_margin(coarse: bool, largest: int) -> None:
    """Search over all steps with an odd part up to 15, from 3/32 to 1, sorted by their margin to ties."""
    found = {}
    for odd in range(1, 16, 2):
        for power in range(2, 7):
            step = odd / 2**power
            gates = torch.arange(-largest, largest + 1).double()
            gates = gates[gates != 0] * step
            if not 0.09 < step <= 1 or largest * odd > 256:
                continue
            narrow = min(margin(silu(gates), E4M3) - 0.02, margin(rounded(silu(gates)), E4M3) - 1e-9) >= 0
            if not coarse or narrow:
                found[step] = margin(silu(gates))
    assert points_for(coarse=coarse, fp8=None).step == max(found, key=lambda step: found[step])


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("coarse", [False, True])
def test_up_payloads_times_a_gate_round_equally_at_any_position(
    fp8: Fp8Format | None,
    coarse: bool,
) -> None:
    points = points_for(coarse=coarse, fp8=fp8)
    ups = torch.arange(1, UP_ENTRIES + 1).double()
    for gate, weight in points.up_gates:
        check_product(gate, weight, ups, coarse=coarse)
        assert odd_part(gate) <= 15


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("coarse", [False, True])
def test_wide_columns_round_equally_in_gates_and_ups(fp8: Fp8Format | None, coarse: bool) -> None:
    points = points_for(coarse=coarse, fp8=fp8)
    for mantissa in points.wide:
        wide = mantissa / 128 * 2.0 ** torch.arange(WIDE_POWERS).double()
        assert margin(silu(wide * points.wide_step)) >= MARGIN
        if coarse and fp8:
            assert margin(silu(wide * points.wide_step), E4M3) >= 0.02
            assert margin(rounded(silu(wide * points.wide_step)), E4M3) > 0
        for gate, weight in points.wide_up_gates:
            check_product(gate, weight, wide, coarse=coarse and fp8 is not None)
    assert fp8 or all(mantissa % 2 for mantissa in points.wide)


def check_product(gate: float, weight: float, ups: Tensor, *, coarse: bool) -> None:
    activation = silu(torch.tensor(gate).double())
    check_rounding(activation * ups, rounded(activation) * ups, weight, coarse=coarse)


def check_rounding(once: Tensor, twice: Tensor, weight: float, *, coarse: bool) -> None:
    assert same(rounded(once), rounded(twice))
    assert same(rounded(weight * once), rounded(weight * rounded(once)))
    assert min(margin(once), margin(weight * once)) >= MARGIN
    assert min(margin(twice), margin(weight * rounded(once))) > 0
    if coarse:
        assert margin(once, E4M3) >= 0.02
        assert margin(rounded(once), E4M3) > 0


@pytest.mark.parametrize("fp8", ["e4m3fn", "e4m3fnuz"])
def test_values_stored_in_e4m3_are_normal_numbers_under_every_scale(fp8: Fp8Format) -> None:
    """A subnormal number would round differently under another scale; scales are 1 or 2 times 1, 2 or 4."""
    plan = plan_exact(256, 128, 4, "fp8", 8, fp8_format=fp8, intermediate="e4m3")
    values = row_values(plan, torch.device("cpu"))[: 2 * plan.points.largest + 1]
    least = float(values[values != 0].abs().min())
    assert least / (4 if fp8 == "e4m3fn" else 8) >= torch.finfo(getattr(torch, f"float8_{fp8}")).tiny


@pytest.mark.parametrize("name", ["gelu", "gelu-tanh", "relu", "identity", "quick-gelu"])
@pytest.mark.parametrize("coarse", [False, True])
def test_other_activations_give_other_values_at_most_probe_points(name: str, coarse: bool) -> None:
    gates = payload(points_for(coarse=coarse, fp8=None))
    other = {
        "gelu": torch.nn.functional.gelu(gates),
        "gelu-tanh": torch.nn.functional.gelu(gates, approximate="tanh"),
        "relu": gates.relu(),
        "identity": gates,
        "quick-gelu": gates * torch.sigmoid(1.702 * gates),
    }[name]
    assert float((rounded(other) != rounded(silu(gates))).double().mean()) > 0.7


OTHERS = [
    *((Formula(activation="gelu"), coarse, fp8) for coarse in (False, True) for fp8 in FORMATS),
    (Formula(activation="swiglu"), False, None),
    (Formula(swiglu_limit=10.0), False, None),
    (Formula(activation="gelu", swiglu_limit=8.0), False, None),
    (Formula(weigh_first=True), False, None),
    (Formula(activation="gelu", weigh_first=True), False, None),
    *((Formula(bias=True), True, fp8) for fp8 in FORMATS),
]


@pytest.mark.parametrize(("formula", "coarse", "fp8"), OTHERS)
def test_points_of_other_formulas_keep_their_margin_to_rounding_ties(
    formula: Formula, coarse: bool, fp8: Fp8Format | None
) -> None:
    points = points_for(coarse=coarse, fp8=fp8, formula=formula)
    halves = halves_are_certain(formula, coarse=coarse, fp8=fp8)
    for weight in (1.0, 0.5) if halves else (1.0,):
        check_points(points, formula, coarse, fp8, weight)


def check_points(points: Points, formula: Formula, coarse: bool, fp8: Fp8Format | None, share: float) -> None:
    """All points times a routing weight that comes first."""
    on = torch.tensor(1.0 - formula.up_shift).double()
    assert points.largest * odd_part(points.step) <= 256
    powers = 2.0 ** torch.arange(WIDE_POWERS).double()
    wide = torch.cat([mantissa / 128 * powers for mantissa in points.wide])
    for gates, narrow in ((payload(points), coarse), (wide * points.wide_step, coarse and fp8 is not None)):
        assert float(gates.min()) > -3.1 or formula.activation != "gelu"
        made = activate(gates * share, on, formula)
        assert margin(made) >= MARGIN
        if narrow:
            assert margin(made, E4M3) >= 0.02
            assert margin(rounded(made), E4M3) > 0
    ups = torch.arange(-UP_ENTRIES, UP_ENTRIES + 1).double()
    both = torch.cat([wide, -wide]) if formula.limit else wide
    for gates_of, read in ((points.up_gates, ups), (points.wide_up_gates, both)):
        for gate, weight in gates_of:
            one = activate(torch.tensor(gate * share).double(), on, formula)
            product = activate(torch.tensor(gate * share).double(), read, formula)
            twice = rounded(one) * (product / one)
            check_rounding(product, twice, weight, coarse=coarse and (fp8 is not None or read is ups))
    if coarse and fp8:
        least = float(activate(payload(points), on, formula).abs().min())
        assert least / (4 if fp8 == "e4m3fn" else 8) >= torch.finfo(getattr(torch, f"float8_{fp8}")).tiny
