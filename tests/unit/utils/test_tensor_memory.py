"""The memory of tensors as bytes, and compared."""

from __future__ import annotations

import math

import pytest
import torch

from distbench.utils.tensor_memory import memory_of, same_memory


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
def test_bytes_are_those_of_the_tensor_and_writing_them_changes_it(dtype: torch.dtype) -> None:
    rows = torch.arange(24, dtype=torch.int32).view(4, 6).to(dtype)[1:3]
    memory = memory_of(rows)
    assert (memory.ndim, memory.itemsize, memory.readonly) == (1, 1, False)
    assert bytes(memory) == bytes(rows.clone().view(torch.uint8).flatten().tolist())
    memory[:] = bytes(len(memory))
    assert not rows.view(torch.uint8).any()


def test_memory_of_no_element_is_empty() -> None:
    assert len(memory_of(torch.empty(0, 7))) == 0


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4).t()[:2], torch.zeros(4, 4)[:, 1:], torch.zeros(2, device="meta")])
def test_memory_that_is_not_contiguous_or_not_of_the_cpu_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not contiguous memory of the CPU"):
        memory_of(tensor)


def test_memory_is_compared_as_bits_not_as_values() -> None:
    rows = torch.tensor([[0.0, 1.0], [math.nan, 2.0]])
    assert same_memory(rows, rows.clone()) is True
    assert same_memory(rows, rows.flip(0).flip(0)) is True
    assert same_memory(rows, torch.tensor([[-0.0, 1.0], [math.nan, 2.0]])) is False
    assert same_memory(rows[1:], torch.tensor([[math.nan, 3.0]])) is False
    assert same_memory(rows[:0], torch.empty(0, 2)) is True


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 4)[:, ::2],
        torch.zeros(2, 2).t(),
        torch.zeros(4),
        torch.zeros(2, 2).int(),
        torch.zeros(2, 2, device="meta"),
    ],
)
def test_memory_of_another_form_is_not_compared(other: torch.Tensor) -> None:
    assert same_memory(torch.zeros(2, 2), other) is None
    assert same_memory(other, torch.zeros(2, 2)) is None
