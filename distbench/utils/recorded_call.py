"""Calls of several Triton launches that are recorded once, and repeated with other addresses.

Preparing a launch, its tensors and its tensor descriptors takes Python longer than the device needs for a few rows. A
repeated call allocates its intermediate tensors at once, and looks nothing up.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from distbench.utils.cuda_kernels import Refused
from distbench.utils.packed_launch import PackedLaunch
from distbench.utils.triton_launch import Launch, current_stream, listen

_ALIGNMENT = 256
# Address, bytes, number of the tensor, offset in it.
_Span = tuple[int, int, int, int]
_RECORDING = threading.local()


def scratch(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an intermediate tensor on the device of `like`, and of its dtype unless another one is given."""
    made = like.new_empty(shape, dtype=dtype)
    tensors = getattr(_RECORDING, "tensors", None)
    if tensors is not None:
        tensors.append(made)
    return made


class _Address:
    """Stands for the tensor of a descriptor."""

    __slots__ = ("value",)

    def data_ptr(self) -> int:
        """Return the address."""
        return self.value  # type: ignore[no-any-return, attr-defined]


class _Packed:
    """One launch through the driver."""

    def __init__(self, launch: Launch, spans: list[_Span]) -> None:
        made = PackedLaunch(launch)
        self._start = made.start
        arguments = launch.arguments
        self._pointers = [(cell, *_place(arguments[at].data_ptr(), spans)) for at, cell in made.pointers]
        self._maps = [(cell, *_place(arguments[at].base.data_ptr(), spans)) for at, cell in made.maps]

    def repeat(self, addresses: list[int], stream: int) -> None:
        for cell, tensor, offset in self._pointers:
            cell.value = addresses[tensor] + offset
        for cell, tensor, offset in self._maps:
            cell.point(addresses[tensor] + offset)
        self._start(stream)


class _Repeated:
    """One launch by Triton's own launcher, past its look-up."""

    def __init__(self, launch: Launch, spans: list[_Span]) -> None:
        self._launch = launch._replace(arguments=())  # which would keep the tensors
        self._values = [None if type(one) is Tensor else one for one in launch.arguments]
        self._tensors: list[tuple[int, int, int]] = []
        self._described: list[tuple[_Address, int, int]] = []
        for position, argument in enumerate(launch.arguments):
            if type(argument) is Tensor:
                self._tensors.append((position, *_place(argument.data_ptr(), spans)))
            elif hasattr(argument, "block_shape"):
                described = copy.copy(argument)
                described.base = _Address()
                self._values[position] = described
                self._described.append((described.base, *_place(argument.base.data_ptr(), spans)))

    def repeat(self, addresses: list[int], stream: int) -> None:
        values = self._values.copy()
        for position, tensor, offset in self._tensors:
            values[position] = addresses[tensor] + offset
        for address, tensor, offset in self._described:
            address.value = addresses[tensor] + offset  # type: ignore[attr-defined]
        self._launch.repeat(stream, values)


class RecordedCall:
    """The launches of one call; `given` tensors are replaced when it is repeated, all others are its scratch."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        """Record nothing yet; see `record`."""
        self._given = list(given)
        self._launches: list[_Packed | _Repeated] = []
        self.scratch_bytes = 0

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the launches of this thread, whose scratch comes from `scratch`."""
        made: list[Tensor] = []
        _RECORDING.tensors = made
        try:
            with listen() as launches:
                yield
        finally:
            _RECORDING.tensors = None
        spans = [
            (tensor.data_ptr(), tensor.numel() * tensor.element_size(), number, 0)
            for number, tensor in enumerate(self._given)
            if tensor is not None
        ]
        for tensor in made:
            size = tensor.numel() * tensor.element_size()
            spans.append((tensor.data_ptr(), size, len(self._given), self.scratch_bytes))
            self.scratch_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._launches = [_repeated(launch, spans) for launch in launches]
        self._given = []

    @property
    def num_launches(self) -> int:
        """Launches that can be repeated; interpreted ones cannot."""
        return len(self._launches)

    def repeat(self, addresses: list[int], device: torch.device) -> None:
        """Make the launches again, with other tensors at `addresses` instead of those given."""
        if self.scratch_bytes:
            space = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=device)  # kept until all are launched
            addresses.append(space.data_ptr())
        stream = current_stream(device.index)
        for one in self._launches:
            one.repeat(addresses, stream)


def _repeated(launch: Launch, spans: list[_Span]) -> _Packed | _Repeated:
    try:
        return _Packed(launch, spans)
    except Refused:
        return _Repeated(launch, spans)


def _place(address: int, spans: list[_Span]) -> tuple[int, int]:
    """Return the number of the tensor that holds an address, and the address's offset in bytes.

    Raises:
        ValueError: none does.
    """
    for start, size, number, offset in spans:
        if start <= address < start + size:
            return number, address - start + offset
    message = "an argument of a recorded launch is neither given to the call nor its scratch"
    raise ValueError(message)
