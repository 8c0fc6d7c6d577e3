"""Bounds of errors hold for any recorded rows: right kernels are within them, and deviating ones are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from distbench.experts.roundings import roundings_of
from distbench.experts.steps import Steps
from distbench.verify.error_bounds import Figures, Yardstick
from distbench.verify.ideal import ideal_rows
from distbench.workload.quantize import quantize_fp8_blocks
from tests.cases import tiny_case
from tests.unit.verify.test_error_check import DEVIATING, HIDDEN, KERNELS, ROWS, SURE, chosen, layer_of


def student(random: Any) -> Any:
    return random.standard_t(2, (ROWS, HIDDEN))


def massive(random: Any) -> Any:
    rows = random.standard_normal((ROWS, HIDDEN))
    rows[:, [7, 300]] *= 1000
    return rows


def alike(random: Any) -> Any:
    return np.repeat(random.standard_normal((1, HIDDEN)), ROWS, axis=0)


def sparse(random: Any) -> Any:
    return random.standard_normal((ROWS, HIDDEN)) * (random.random((ROWS, HIDDEN)) < 2 / HIDDEN)


def scaled(random: Any) -> Any:
    rows = random.standard_normal((ROWS, HIDDEN)) * np.geomspace(2.0**-15, 2.0**15, ROWS)[:, None]
    rows[::9] = 0
    return rows


def whole(random: Any) -> Any:
    return random.integers(-2, 3, (ROWS, HIDDEN)).astype(float)


ROWS_OF: dict[str, Callable[[Any], Any]] = {
    "student": student,
    "massive": massive,
    "alike": alike,
    "sparse": sparse,
    "scaled": scaled,
    "whole": whole,
}


def measured(
    rows: str, dtype: Literal["bf16", "fp8"], kernel: str, steps: Steps | None = None, *, drawn: bool = False
) -> Figures:
    """Figures of a kernel by the bounds of recorded rows, or by those of drawn ones."""
    layer = layer_of(dtype)
    hidden = torch.from_numpy(ROWS_OF[rows](np.random.default_rng(7))).bfloat16()
    scales: Tensor | None = None
    if dtype == "fp8":
        hidden, scales = quantize_fp8_blocks(hidden, torch.float8_e4m3fn)
    batch = layer.batch._replace(hidden=hidden, scales=scales)
    family = roundings_of(tiny_case(2, dispatch_dtype=dtype), chosen(**KERNELS[kernel]))
    exact, (ideal,) = ideal_rows(batch, layer.weights, [family])
    return Yardstick(exact, ideal, SURE, drawn=drawn).measure(layer.run(KERNELS[kernel], steps, batch))


@pytest.mark.parametrize(
    ("rows", "kernel", "dtype"),
    [*((rows, "reduce", "bf16") for rows in ROWS_OF), ("massive", "reduce", "fp8"), ("scaled", "one stage", "fp8")],
)
def test_right_kernels_are_within_the_bounds_of_any_rows(rows: str, kernel: str, dtype: Literal["bf16", "fp8"]) -> None:
    found = measured(rows, dtype, kernel)
    assert found.within, found
    assert found.ratio is not None
    assert 0.98 <= found.ratio <= 1.02


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [
        ("massive", "gate + 0.01"),
        ("sparse", "bf16 accumulation, stage 1"),
        ("scaled", "gate and up rounded to bf16"),
        ("alike", "truncated output"),
        ("whole", "hidden in int8"),
        ("student", "bf16 accumulation, stage 2"),
    ],
)
def test_deviating_kernels_are_outside_the_bounds_of_any_rows(rows: str, kernel: str) -> None:
    assert not measured(rows, "bf16", "reduce", DEVIATING[kernel][0]()).within


def test_bounds_are_wider_for_recorded_rows_and_still_narrow() -> None:
    known, unknown = (measured("student", "bf16", "reduce", drawn=drawn).allowed for drawn in (True, False))
    assert unknown["ratio_low"] < known["ratio_low"] < 1 < known["ratio_high"] < unknown["ratio_high"] < 1.15
