"""Kernels are compiled once per specialisation of Triton, and launched from the cache otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distbench.utils.triton_launch import launch


class Kernel:
    """Fake `triton.jit` function that records its compilations and launches."""

    arg_names = ("rows", "out", "count", "WIDTH", "BLOCK")

    def __init__(self, *, interpreted: bool = False) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self._interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: object, **constants: object) -> Any:
            self.compiled.append((grid, arguments, constants))
            return None if self._interpreted else SimpleNamespace(run=self._run, function="f", packed_metadata="m")

        return run

    def _run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@pytest.fixture(autouse=True)
def _stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)  # noqa: SLF001


ROWS = torch.zeros(64)
CONSTANTS = {"BLOCK": 16, "WIDTH": 5, "num_warps": 4}


def test_second_launch_passes_addresses_and_constants_in_order() -> None:
    kernel = Kernel()
    for count in (3, 5):
        launch(kernel, (7, 2), ROWS, None, count, **CONSTANTS)
    assert kernel.compiled == [((7, 2), (ROWS, None, 3), CONSTANTS)]
    hooks = (None, None, None)
    assert kernel.launched == [(7, 2, 1, 99, "f", "m", *hooks, ROWS.data_ptr(), None, 5, 5, 16)]


DESCRIPTOR = SimpleNamespace(base=ROWS, block_shape=[16, 8])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ROWS, ROWS.double()),
        (ROWS, ROWS[1:]),
        (ROWS, None),
        (3, 1),
        (3, 32),
        (DESCRIPTOR, SimpleNamespace(base=ROWS, block_shape=[16, 16])),
        (DESCRIPTOR, SimpleNamespace(base=ROWS.half(), block_shape=[16, 8])),
    ],
)
def test_arguments_that_triton_specialises_on_are_compiled_separately(first: object, second: object) -> None:
    kernel = Kernel()
    for argument in (first, second, first, second):
        launch(kernel, (1,), ROWS, argument, 2, **CONSTANTS)
    assert (len(kernel.compiled), len(kernel.launched)) == (2, 2)


def test_other_constants_are_compiled_separately() -> None:
    kernel = Kernel()
    for width in (5, 6):
        launch(kernel, (1,), ROWS, None, 2, **CONSTANTS | {"WIDTH": width})
    assert len(kernel.compiled) == 2


def test_interpreted_kernel_is_run_without_caching() -> None:
    kernel = Kernel(interpreted=True)
    for _ in range(3):
        launch(kernel, (1,), ROWS, None, 2, **CONSTANTS)
    assert len(kernel.compiled) == 3
