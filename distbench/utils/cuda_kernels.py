"""Kernels in CUDA C++: compiled by NVRTC, kept as files, launched through the driver.

NVRTC and cuda-bindings come with torch's CUDA wheels from torch 2.11 on, so neither nvcc nor a toolkit is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import secrets
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from distbench.errors import Unsupported

TENSOR_MAP_BYTES = 128
# Values of CUtensorMapSwizzle.
SWIZZLE_NONE, SWIZZLE_128B = 0, 3
_DIGEST_BYTES = hashlib.sha256().digest_size


def check_cuda_bindings() -> None:
    """Check that kernels can be compiled.

    Raises:
        Unsupported: cuda-bindings or NVRTC is missing; the message names what to install.
    """
    try:
        _result(_cuda("nvrtc").nvrtcVersion())
        _result(_cuda("driver").cuDriverGetVersion())
    except (ImportError, RuntimeError) as error:
        message = (
            f"kernels in CUDA C++: {error}; install cuda-bindings and nvidia-cuda-nvrtc for torch's CUDA "
            f"({torch.version.cuda}), or choose Triton's kernels with --kernel-table"
        )
        raise Unsupported(message) from error


def compiled(source: str, architecture: str, folder: Path) -> bytes:
    """Return the machine code of `source` for an architecture such as sm_90a, from `folder` if it is known there.

    Raises:
        RuntimeError: the source does not compile; the message has NVRTC's log.
    """
    nvrtc = _cuda("nvrtc")
    _, *version = nvrtc.nvrtcVersion()
    digest = hashlib.sha256(f"{architecture} {version} {source}".encode()).hexdigest()
    path = folder / f"distbench-{digest[:32]}.cubin"
    code = _kept(path)
    if code is None:
        code = _made(nvrtc, source, architecture)
        _keep(path, code)
    return code


def _made(nvrtc: Any, source: str, architecture: str) -> bytes:
    program = _result(nvrtc.nvrtcCreateProgram(source.encode(), b"distbench.cu", 0, [], []))
    flags = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if int(error):
        log = b" " * _result(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        message = f"NVRTC: {error.name}: {log.decode(errors='replace')}"
        raise RuntimeError(message)
    code: bytes = b" " * _result(nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, code)
    return code


def _kept(path: Path) -> bytes | None:
    """Return the code of a file whose last bytes are its digest; None without the file, or where it is not whole."""
    if not path.exists():
        return None
    content = path.read_bytes()
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return code if digest == hashlib.sha256(code).digest() else None


def _keep(path: Path, code: bytes) -> None:
    """Write the file so that it appears whole; other processes, of other hosts too, may do the same."""
    unfinished = path.with_suffix(f".{secrets.token_hex(8)}")
    try:
        unfinished.write_bytes(code + hashlib.sha256(code).digest())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class Kernel:
    """A compiled kernel on the current device."""

    def __init__(self, code: bytes, name: str, threads: int, shared_bytes: int) -> None:
        """Load the function `name` of `code`; a block has `threads` threads and this much dynamic shared memory.

        Raises:
            RuntimeError: the driver refuses it.
        """
        driver = _cuda("driver")
        torch.cuda.current_stream()  # makes torch's context the current one
        module = _result(driver.cuModuleLoadData(code))
        self._function = _result(driver.cuModuleGetFunction(module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _result(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))
        self._threads, self._shared_bytes = threads, shared_bytes

    def launch(self, blocks: int, stream: int, arguments: Sequence[Any]) -> None:
        """Launch on a stream; arguments are ctypes objects with the layout of the kernel's.

        Raises:
            RuntimeError: the driver refuses the launch.
        """
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        grid = blocks, 1, 1
        start(self._function, grid, self._threads, self._shared_bytes, stream, ctypes.addressof(addresses))


class Refused(Exception):
    """A kernel cannot be launched with packed arguments."""


def function_of(handle: int) -> Any:
    """Return the driver's function of a handle.

    Raises:
        Refused: cuda-bindings is missing.
    """
    try:
        return _cuda("driver").CUfunction(handle)
    except ImportError as error:
        raise Refused from error


def argument_sizes(function: Any, most: int) -> list[int]:
    """Return the sizes of a kernel's arguments in bytes: of all of them, but at most one more than `most`."""
    sizes: list[int] = []
    while len(sizes) <= most:
        error, _, size = _cuda("driver").cuFuncGetParamInfo(function, len(sizes))
        if int(error):
            break
        sizes.append(int(size))
    return sizes


def start(function: Any, grid: tuple[int, ...], threads: int, shared_bytes: int, stream: int, arguments: int) -> None:
    """Launch a function; `arguments` is the address of the addresses of its arguments.

    Raises:
        RuntimeError: the driver refuses the launch.
    """
    (error,) = _launcher()(function, *grid, threads, 1, 1, shared_bytes, stream, arguments, 0)
    if int(error):
        message = f"CUDA: {error.name}"
        raise RuntimeError(message)


@lru_cache(maxsize=1)
def _launcher() -> Any:
    return _cuda("driver").cuLaunchKernel


@lru_cache(maxsize=1024)
def tensor_map(
    address: int,
    element_bytes: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = SWIZZLE_NONE,
) -> bytes:
    """Return a CUtensorMap of a tensor whose dimensions come innermost first; `strides` in bytes, without the first.

    Loads past the end give zeros.

    Raises:
        RuntimeError: the driver refuses it.
    """
    driver = _cuda("driver")
    made = _result(
        driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_UINT{8 * element_bytes}"),
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1) for _ in box],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle(swizzle),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(made.getPtr(), TENSOR_MAP_BYTES)


@lru_cache
def _cuda(name: str) -> Any:
    return importlib.import_module(f"cuda.bindings.{name}")


def _result(answer: tuple[Any, ...]) -> Any:
    error, *rest = answer
    if int(error):
        message = f"CUDA: {error.name}"
        raise RuntimeError(message)
    return rest[0] if rest else None
