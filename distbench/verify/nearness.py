"""Distances between rows, as a share of the row's largest magnitude, for comparison with a tolerance."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return each row's largest error, float32 [n], as a share of the largest magnitude expected; NaN with a NaN."""
    error = (actual.float() - expected.float()).abs().amax(1)
    scale = expected.float().abs().amax(1)
    return torch.where(error == 0, 0.0, error / scale)


def relative_error(actual: Tensor, expected: Tensor) -> float | None:
    """Return the worst of `row_errors`; None where it is NaN or infinite."""
    if torch.equal(actual, expected):
        return 0.0
    worst = float(row_errors(actual, expected).max())
    return worst if math.isfinite(worst) else None


def far_rows(actual: Tensor, expected: Tensor, allowed: float) -> int:
    """Count rows [n, H] further than `allowed` from the expected rows, or with a NaN that these do not have."""
    return int((~(row_errors(actual, expected) <= allowed)).sum())
