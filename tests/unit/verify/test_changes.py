"""Weights that experts overwrite, and rows that come late."""

from __future__ import annotations

import pytest
import torch

from distbench.experts.base import ExpertWeights
from distbench.transport.base import Dispatched
from distbench.verify.changes import Looks, WeightsWatch, words_of


def weights() -> ExpertWeights:
    made = torch.Generator().manual_seed(0)
    w1, w2, bias1, bias2 = (torch.randn(*shape, generator=made) for shape in ((2, 6, 8), (2, 8, 3), (2, 6), (2, 8)))
    return ExpertWeights(w1.bfloat16(), w2.bfloat16(), torch.tensor([0, 0, 1, 1], dtype=torch.int32), bias1, bias2)


def test_weights_that_stay_are_no_finding() -> None:
    assert WeightsWatch(weights(), 1).changed() is None


@pytest.mark.parametrize("name", ExpertWeights._fields)
def test_one_changed_element_is_a_finding_of_the_experts(name: str) -> None:
    held = weights()
    watch = WeightsWatch(held, 1)
    held._asdict()[name].view(-1)[-1] *= -3
    if name == "mask":
        held.mask[-1] = 0
    found = watch.changed()
    assert found is not None
    assert (found.stage, found.rank, found.field, found.rows) == ("experts", 1, name, 1)
    assert found.proven


@pytest.mark.parametrize(("columns", "word"), [(4, torch.int64), (6, torch.int32), (3, torch.int16)])
def test_words_divide_a_row_wherever_it_begins(columns: int, word: torch.dtype) -> None:
    rows = torch.arange(5 * columns, dtype=torch.bfloat16).view(5, columns)
    moved = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(5, columns)
    assert words_of(rows).dtype is word
    assert torch.equal(words_of(moved), words_of(rows))
    assert torch.equal(words_of(rows.t().contiguous().t()), words_of(rows))


def test_rows_past_a_buffer_that_is_too_small_did_not_come_late() -> None:
    right = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    looks = Looks(4)
    buffer = right[:3].clone()
    buffer[1] = 0
    looks.arrived(Dispatched(buffer, None, buffer, buffer, torch.tensor([4])))
    late = looks.late([right] * 3, torch.arange(4))
    assert late.tolist() == [False, True, False, False]
