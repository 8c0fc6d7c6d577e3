"""The memory of a tensor as bytes."""

from __future__ import annotations

import pytest
import torch

from distbench.utils.tensor_memory import memory_of


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
