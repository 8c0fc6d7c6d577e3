"""Patterns of wrong rows, in every dtype that travels."""

from __future__ import annotations

import pytest
import torch

from distbench.verify.damage_patterns import pattern_of
from distbench.verify.records import MULTIPLIED

_DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_doubled_rows_are_named_in_every_dtype(dtype: torch.dtype) -> None:
    right = torch.tensor([[1.0, 2.0, -3.0, 0.0]]).to(dtype)
    doubled = (right.float() * 2).to(dtype)
    assert pattern_of(doubled, right, lambda: torch.zeros(0)) == f"{MULTIPLIED} 2"
