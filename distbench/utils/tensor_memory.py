"""The memory of tensors of the CPU, as bytes and compared."""

from __future__ import annotations

import ctypes

from torch import Tensor

_PY_BUF_WRITE = 0x200
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.restype = ctypes.py_object
_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, which may be written to; the tensor has to outlive them.

    `tensor.numpy()` does the same in six operations of torch, which cost a tiny case a hundredth of its time.

    Raises:
        ValueError: the tensor is on a device, or not contiguous.
    """
    if not (tensor.is_cpu and tensor.is_contiguous()):
        message = f"the tensor of shape {tuple(tensor.shape)} on {tensor.device} is not contiguous memory of the CPU"
        raise ValueError(message)
    size = tensor.nbytes
    found: memoryview = _view(tensor.data_ptr(), size, _PY_BUF_WRITE) if size else memoryview(b"")
    return found


def same_memory(one: Tensor, other: Tensor) -> bool | None:
    """Whether tensors of one shape and dtype hold the same bytes; None unless both are contiguous and of the CPU.

    A comparison by torch takes three operations, two of them views as integers.
    """
    if not (one.is_cpu and other.is_cpu and one.is_contiguous() and other.is_contiguous()):
        return None
    if one.shape != other.shape or one.dtype != other.dtype:
        return None
    same: int = _compare(one.data_ptr(), other.data_ptr(), one.nbytes)
    return same == 0
