"""Poison: NaN in every float type, else an id that no model has."""

from __future__ import annotations

import pytest
import torch

from distbench.transport.base import POISON_ID, poison_


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_poisoned_floats_are_nan(dtype: torch.dtype) -> None:
    rows = torch.zeros(2, 3).to(dtype)
    poison_(rows)
    assert bool(rows.float().isnan().all())


def test_poisoned_ids_are_out_of_range_of_any_model() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int32)
    poison_(ids)
    assert bool((ids == POISON_ID).all())
