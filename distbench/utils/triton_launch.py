"""Launches of Triton kernels that bypass Triton's own look-up, which takes most of a launch's time.

Triton specialises a kernel on the types of its arguments, on pointers and numbers that are multiples of 16, on
numbers that are 1, and on constants. A kernel already compiled for the same specialisation is launched directly, with
addresses for its tensors: Triton would query each tensor for its address, and the driver for its kind. Triton's
launch hooks, which profilers set, see the first launch only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16
# Arguments of the hooks: metadata of the launch, hook before it, hook after it.
_NO_HOOKS = None, None, None


class _Compiled(NamedTuple):
    """Triton's arguments to the driver for a kernel, and the constants that follow the kernel's arguments."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any
    constants: tuple[object, ...]


class Launch(NamedTuple):
    """A launch that was made: its arguments without constants."""

    compiled: _Compiled
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    def repeat(self, stream: int, values: list[Any]) -> None:
        """Launch again on a stream, with addresses for tensors."""
        _, run, function, metadata, constants = self.compiled
        run(*self.grid, stream, function, metadata, *_NO_HOOKS, *values, *constants)


_COMPILED: dict[tuple[object, ...], _Compiled] = {}
_LISTENING = threading.local()


@contextmanager
def listen() -> Iterator[list[Launch]]:
    """Collect this thread's launches; interpreted ones are none."""
    launches: list[Launch] = []
    _LISTENING.launches = launches
    try:
        yield launches
    finally:
        _LISTENING.launches = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a `triton.jit` function, whose constants stand last: kernel[grid](*arguments, **constants).

    arguments are tensors (at least one), tensor descriptors, numbers and None; constants may include Triton's options.
    The launch uses the current device, which holds the tensors, and its stream. Interpreted kernels run as usual.
    """
    given: list[object] = []
    kinds: list[object] = []
    for one in arguments:
        if type(one) is Tensor:
            address = one.data_ptr()
            given.append(address)
            kinds.append((one.dtype, address % _ALIGNMENT))
        else:
            given.append(one)
            kinds.append(_kind(one))
    device = next(one for one in arguments if type(one) is Tensor).get_device()
    key = (id(kernel), device, *kinds, *constants.values())
    known = _COMPILED.get(key)
    launched = Launch(known, (*grid, 1, 1)[:3], arguments) if known is not None else None
    if launched is not None:
        launched.repeat(current_stream(device), given)
    else:
        compiled = kernel[grid](*arguments, **constants)
        if compiled is None:
            return
        last = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        known = _Compiled(compiled, compiled.run, compiled.function, compiled.packed_metadata, last)
        _COMPILED[key] = known
        launched = Launch(known, (*grid, 1, 1)[:3], arguments)
    heard = getattr(_LISTENING, "launches", None)
    if heard is not None:
        heard.append(launched)


def current_stream(device: int) -> int:
    """Return the handle of the device's current stream."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)  # noqa: SLF001 - the public way makes an object each time
    return stream


def _kind(argument: Any) -> tuple[object, ...] | None:
    if argument is None:
        return None
    if isinstance(argument, int):
        return argument == 1, argument % _ALIGNMENT == 0
    return argument.base.dtype, *argument.block_shape
