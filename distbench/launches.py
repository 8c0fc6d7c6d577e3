"""Triton kernels launched past Triton's own look-up, which takes most of the time of a launch.

What Triton compiles depends on the types of the arguments, on whether pointers and numbers are multiples of 16, on
numbers that are 1, and on constants. A kernel that was compiled for the same of all these is launched directly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_ALIGNMENT = 16
_COMPILED: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a `triton.jit` function, whose constants stand last: kernel[grid](*arguments, **constants).

    arguments are tensors, one of them at least, tensor descriptors, numbers and None; constants may have Triton's
    options among them. On the current device and stream; interpreted kernels are run as ever.
    """
    kinds = [(one.dtype, one.data_ptr() % _ALIGNMENT) if type(one) is Tensor else _kind(one) for one in arguments]
    device = next(one for one in arguments if type(one) is Tensor).get_device()
    key = (id(kernel), device, *kinds, *constants.values())
    known = _COMPILED.get(key)
    if known is not None:
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*arguments, *values)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:
        _COMPILED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Any) -> tuple[object, ...] | None:
    if argument is None:
        return None
    if isinstance(argument, int):
        return argument == 1, argument % _ALIGNMENT == 0
    return argument.base.dtype, *argument.block_shape
