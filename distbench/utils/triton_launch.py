"""Launches of Triton kernels that bypass Triton's own look-up, which takes most of a launch's time.

Triton specialises a kernel on the types of its arguments, on pointers and numbers that are multiples of 16, on
numbers that are 1, and on constants. A kernel already compiled for the same specialisation is launched directly, with
addresses for its tensors: Triton would query each tensor for its address, and the driver for its kind. Triton's
launch hooks, which profilers set, see the first launch only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16
# Arguments of the hooks: metadata of the launch, hook before it, hook after it.
_NO_HOOKS = None, None, None


class _Compiled(NamedTuple):
    """Triton's arguments to the driver for a kernel, and the constants that follow the kernel's arguments."""

    run: Any
    function: Any
    metadata: Any
    constants: tuple[object, ...]


_COMPILED: dict[tuple[object, ...], _Compiled] = {}


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
    if known is not None:
        stream = torch._C._cuda_getCurrentRawStream(device)  # noqa: SLF001 - the public way makes an object each time
        values = *given, *known.constants
        known.run(*(*grid, 1, 1)[:3], stream, known.function, known.metadata, *_NO_HOOKS, *values)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:
        last = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _COMPILED[key] = _Compiled(compiled.run, compiled.function, compiled.packed_metadata, last)


def _kind(argument: Any) -> tuple[object, ...] | None:
    if argument is None:
        return None
    if isinstance(argument, int):
        return argument == 1, argument % _ALIGNMENT == 0
    return argument.base.dtype, *argument.block_shape
