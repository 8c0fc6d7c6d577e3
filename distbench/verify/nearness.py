"""How far rows are from others, as a share of the row's largest magnitude: what is held against a tolerance."""

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
    """Return the worst of `row_errors`; None where a NaN or an infinity is in the way."""
    if torch.equal(actual, expected):
        return 0.0
    worst = float(row_errors(actual, expected).max())
    return worst if math.isfinite(worst) else None


def far_rows(actual: Tensor, expected: Tensor, allowed: float) -> int:
    """Count rows [n, H] that are further from those expected than `allowed`, or hold a NaN where these do not."""
    return int((~(row_errors(actual, expected) <= allowed)).sum())
