"""Triton kernels launched through the driver, their arguments packed in memory: the cheapest launch that Python has.

Triton passes a kernel its arguments without constants in order, a tensor descriptor as a tensor map with shape and
strides, and two addresses of scratch memory at the end. The driver tells the sizes of a kernel's arguments; a kernel
whose sizes are others, or that asks for more than a plain launch, is not packed.
"""

from __future__ import annotations

import ctypes
from typing import Any

from distbench.utils.cuda_kernels import TENSOR_MAP_BYTES, Refused, argument_sizes, function_of, start, tensor_map
from distbench.utils.triton_launch import Launch

_WARP = 32
_PLAIN = {"i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "u64": ctypes.c_uint64}
_SCRATCH = 2


class MapCell:
    """A tensor map in packed arguments, encoded again when its tensor moves."""

    def __init__(self, descriptor: Any, layout: Any) -> None:
        """`layout` is what Triton compiled the kernel for."""
        size = layout["elem_size"]
        self.cell = ctypes.create_string_buffer(TENSOR_MAP_BYTES)
        self._layout = (
            size,
            tuple(reversed(descriptor.shape)),
            tuple(size * stride for stride in reversed(descriptor.strides[:-1])),
            tuple(reversed(layout["block_size"])),
            layout["swizzle"],
        )
        self._address = -1

    def point(self, address: int) -> None:
        """Set the address of the tensor."""
        if address != self._address:
            self.cell.raw = tensor_map(address, *self._layout)
            self._address = address


class PackedLaunch:
    """A launch with packed arguments. `pointers` and `maps` have a cell for each argument's position."""

    def __init__(self, launch: Launch) -> None:
        """Pack the arguments of a launch that Triton made.

        Raises:
            Refused: the kernel is launched in another way.
        """
        compiled = launch.compiled.kernel
        metadata, signature = compiled.metadata, compiled.src.signature
        extras = "launch_pdl", "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size"
        if metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in extras):
            raise Refused
        self.pointers: list[tuple[int, Any]] = []
        self.maps: list[tuple[int, MapCell]] = []
        self._cells: list[Any] = []
        layouts = list(getattr(metadata, "tensordesc_meta", None) or [])
        for position, (argument, kind) in enumerate(zip(launch.arguments, signature.values(), strict=False)):
            self._add(position, argument, kind, layouts)
        self._cells += [ctypes.c_uint64(0) for _ in range(_SCRATCH)]
        self._function = function_of(launch.compiled.function)
        if argument_sizes(self._function, len(self._cells)) != [ctypes.sizeof(cell) for cell in self._cells]:
            raise Refused
        self._addresses = (ctypes.c_void_p * len(self._cells))(*map(ctypes.addressof, self._cells))
        self._where = ctypes.addressof(self._addresses)
        self._grid, self._threads, self._shared = launch.grid, _WARP * metadata.num_warps, metadata.shared

    def _add(self, position: int, argument: Any, kind: str, layouts: list[Any]) -> None:
        if kind.startswith("tensordesc"):
            layout = layouts.pop(0) if layouts else None
            if layout is None or layout.get("fp4_padded"):
                raise Refused
            self.maps.append((position, MapCell(argument, layout)))
            self._cells.append(self.maps[-1][1].cell)
            self._cells += [ctypes.c_int32(size) for size in argument.shape]
            self._cells += [ctypes.c_int64(stride) for stride in argument.strides]
        elif kind.startswith("*"):
            self.pointers.append((position, ctypes.c_uint64(0)))
            self._cells.append(self.pointers[-1][1])
        elif kind in _PLAIN:
            self._cells.append(_PLAIN[kind](argument))
        elif kind != "constexpr":
            raise Refused

    def start(self, stream: int) -> None:
        """Launch on a stream, with the arguments as they are now."""
        start(self._function, self._grid, self._threads, self._shared, stream, self._where)
