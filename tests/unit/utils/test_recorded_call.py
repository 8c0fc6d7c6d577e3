"""A recorded call repeats its launches with other tensors and other scratch, and no look-up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distbench.utils.recorded_call import RecordedCall, scratch
from distbench.utils.triton_launch import launch

CPU = torch.device("cpu")


class Kernel:
    """Fake `triton.jit` function; a launch from its cache keeps the arguments, descriptors by their address."""

    arg_names = ("rows", "matrix", "middle", "count", "WIDTH")

    def __init__(self) -> None:
        self.compiled = 0
        self.launched: list[list[Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*_: object, **__: object) -> Any:
            self.compiled += 1
            metadata = SimpleNamespace(num_ctas=2)  # not to be packed
            source = SimpleNamespace(signature={})
            return SimpleNamespace(run=self._run, function="f", packed_metadata="m", metadata=metadata, src=source)

        return run

    def _run(self, *arguments: Any) -> None:
        self.launched.append([one.base.data_ptr() if hasattr(one, "base") else one for one in arguments[9:]])


@pytest.fixture(autouse=True)
def _stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)  # noqa: SLF001


def described(matrix: Tensor) -> Any:
    return SimpleNamespace(base=matrix, block_shape=[16, 8])


def record(kernel: Kernel, rows: Tensor, weights: Tensor) -> RecordedCall:
    call = RecordedCall([rows, None, weights])
    with call.record():
        first, second = scratch(rows, 3, dtype=torch.float32), scratch(rows, 5, dtype=torch.float32)
        launch(kernel, (4,), rows[1:], described(weights), first, 9, WIDTH=2)
        launch(kernel, (4,), rows, described(second), second[2:], 9, WIDTH=2)
    return call


def test_repeated_call_has_the_addresses_of_its_tensors_and_one_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, made = Kernel(), []
    call = record(kernel, torch.zeros(8), torch.zeros(8))
    assert call.scratch_bytes == 512
    kernel.launched.clear()
    compiled = kernel.compiled

    def allocate(size: int, **_: object) -> Tensor:
        made.append(torch.zeros(size, dtype=torch.uint8))
        return made[-1]

    monkeypatch.setattr(torch, "empty", allocate)
    call.repeat([1000, 0, 5000], CPU)
    (space,) = (one.data_ptr() for one in made)
    assert kernel.launched == [[1004, 5000, space, 9, 2], [1000, space + 256, space + 256 + 8, 9, 2]]
    assert kernel.compiled == compiled


def test_tensor_that_is_neither_given_nor_scratch_is_refused() -> None:
    kernel, rows, other = Kernel(), torch.zeros(8), torch.zeros(8)
    call = RecordedCall([rows])
    with pytest.raises(ValueError, match="neither given"), call.record():
        launch(kernel, (4,), rows, None, other, 9, WIDTH=2)


def test_launches_after_a_recording_are_not_recorded() -> None:
    kernel, rows = Kernel(), torch.zeros(8)
    call = record(kernel, rows, rows)
    launch(kernel, (4,), rows, None, rows, 9, WIDTH=2)
    kernel.launched.clear()
    call.repeat([1000, 0, 5000], CPU)
    assert len(kernel.launched) == 2
