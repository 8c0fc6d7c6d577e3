"""The symmetric heap of one rank: contiguous bytes, so that a write past one buffer lands in the next."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from distbench.transport.mori.emulated.quirks import trap

_ALIGNMENT = 256
_PAST_THE_END = 0x7F


class Heap:
    """`size` zero bytes on `device`; on the CPU a page is allocated at its first write."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._device = device
        self._live = 0
        self._top = 0
        self.bytes = self._fresh()

    def malloc(self, size: int) -> Region:
        """Return `size` zero bytes.

        Raises:
            RuntimeError: the heap has no room for them.

        """
        if self._top + size > self.size:
            message = (
                f"out of symmetric heap memory: {size} bytes asked for, {self.size - self._top} of {self.size} are "
                "free; raise MORI_SHMEM_HEAP_SIZE"
            )
            raise RuntimeError(message)
        region = Region(self, self._top, size)
        self._top += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._live += 1
        return region

    def free(self, regions: int) -> None:
        """Free that many regions; once none is left, the heap is reset."""
        self._live -= regions
        if not self._live:
            self._top = 0
            self.bytes = self._fresh()

    @property
    def used(self) -> int:
        """Bytes up to the end of the last region."""
        return self._top

    @torch.inference_mode(mode=False)
    def _fresh(self) -> Tensor:
        if self._device.type == "cpu":
            return torch.frombuffer(mmap.mmap(-1, max(self.size, 1)), dtype=torch.uint8)
        return torch.zeros(max(self.size, 1), dtype=torch.uint8, device=self._device)


class Region:
    """One buffer of the heap. Accesses are checked against the end of the heap only, not of the region."""

    def __init__(self, heap: Heap, start: int, size: int) -> None:
        self._heap = heap
        self._start = start
        self.size = size

    def view(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return a view [rows, columns] from the start of the region."""
        width = columns * dtype.itemsize
        return self._reach(rows * width).view(dtype).view(rows, columns)

    def begins_at(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a view of this region."""
        start = self._heap.bytes.data_ptr() + self._start
        return bool(self.size) and tensor.numel() > 0 and tensor.data_ptr() == start

    def put(self, slots: Tensor, rows: Tensor) -> None:
        """Write rows uint8 [m, width] at slots int64 [m] of that width."""
        if rows.numel():
            self._slots(slots, rows.shape[1])[slots] = rows

    def take(self, slots: Tensor, width: int) -> Tensor:
        """Return the rows at slots int64 [m], uint8 [m, width]."""
        if not slots.numel():
            return self._heap.bytes.new_empty(0, width)
        return self._slots(slots, width)[slots]

    def _slots(self, slots: Tensor, width: int) -> Tensor:
        return self._reach((int(slots.max()) + 1) * width).view(-1, width)

    def _reach(self, size: int) -> Tensor:
        stop = self._start + size
        if stop > self._heap.size:
            trap(f"memory access fault: byte {stop} of a heap of {self._heap.size}")
        return self._heap.bytes[self._start : stop]


def at_address(tensor: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Return the bytes at a tensor's address as [rows, columns] of `dtype`, whatever its own; past its end, garbage."""
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    start, wanted = tensor.storage_offset() * tensor.element_size(), rows * columns * dtype.itemsize
    found = storage[start : start + wanted]
    if found.numel() < wanted:
        found = torch.cat([found, found.new_full((wanted - found.numel(),), _PAST_THE_END)])
    return found.view(dtype).view(rows, columns)
