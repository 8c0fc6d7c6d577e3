"""Build and launch of cluster_products.cu: both matrix products for many rows, by Hopper's own means."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.errors import Unsupported
from distbench.experts.triton.config import CLUSTER_MULTIPLES, KernelConfig
from distbench.utils.cuda_kernels import (
    SWIZZLE_128B,
    TENSOR_MAP_BYTES,
    Kernel,
    check_cuda_bindings,
    compiled,
    tensor_map,
)
from distbench.utils.triton_launch import current_stream

THREADS = 384
_STEP_BYTES = 128
_ARCHITECTURE = "sm_90a"
_CAPABILITY = 9, 0
_GROUP = 16
"""Rows of weights in a part of the swizzled tile; the tensor map orders rows within it."""


class Layer(NamedTuple):
    """One product: stage (1: w1 [El, 2I, H], 2: w2 [El, H, I]), its output columns (I or H), and its tables' width."""

    stage: int
    fp8: bool
    columns: int
    row_bytes: int
    local: int
    depth: int
    places: int

    @property
    def name(self) -> str:
        """Name of the kernel, which profilers show."""
        return ("cluster_gate_up", "cluster_down")[self.stage - 1]

    @property
    def shared_bytes(self) -> int:
        """Size of Shared in the source."""
        tiles = self.depth * (2 * 128 + self.places) * _STEP_BYTES
        scales = 512 * (self.depth if self.fp8 else 1)
        return tiles + scales + 2 * self.places * (144 + 4) + 12 * self.local + 16 * self.depth


class _Given(ctypes.Structure):
    """Given in the source."""

    _fields_ = (
        ("weight_scales", ctypes.c_void_p),
        ("routing", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("output_scales", ctypes.c_void_p),
        ("stride", ctypes.c_int32),
    )


class Rows(NamedTuple):
    """Rows in the order of places [P, K], and for float8 their scales [K/128, P rounded up to a multiple of 4]."""

    rows: Tensor
    scales: Tensor | None


@lru_cache
def check(hidden_size: int, intermediate_size: int, device: torch.device) -> None:
    """Check that the kernels can compute a layer on a device.

    Raises:
        Unsupported: names the size or the part that does not fit.
    """
    if not is_hopper(device):
        message = f"kernels in CUDA C++: {torch.cuda.get_device_name(device)} is no Hopper GPU (sm_90); use Triton's"
        raise Unsupported(message)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    for (name, size), least in zip(sizes.items(), CLUSTER_MULTIPLES, strict=True):
        if size % least:
            message = f"kernels in CUDA C++: {name} = {size}: must be a multiple of {least}; use Triton's kernels"
            raise Unsupported(message)
    check_cuda_bindings()


def is_hopper(device: torch.device | None = None) -> bool:
    """Return whether a device, else the current one, runs the kernels."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == _CAPABILITY


def layer_of(stage: int, weights: Tensor, config: KernelConfig, local: int) -> Layer:
    """Constants for which a product's kernel is compiled."""
    tile = config.stage1 if stage == 1 else config.stage2
    _, height, width = weights.shape
    return Layer(
        stage=stage,
        fp8=weights.element_size() == 1,
        columns=height // 2 if stage == 1 else height,
        row_bytes=width * weights.element_size(),
        local=local,
        depth=tile.stages,
        places=config.block_m // 2,
    )


def multiply(  # noqa: PLR0913 - the parts of a launch
    layer: Layer,
    given: Rows,
    weights: Tensor,
    weight_scales: Tensor | None,
    tables: tuple[Tensor, Tensor],
    routing: Tensor | None,
    output: Rows,
    processors: int,
) -> None:
    """Launch one product over the places, into `output`; `tables` are those of the sort, `routing` [P] float32."""
    maps = _weight_map(layer, weights)
    places, row_bytes = given.rows.shape[0], layer.row_bytes
    address = given.rows.data_ptr()
    for height in (64, 32, 16, 8):
        maps += tensor_map(address, 1, (row_bytes, places), (row_bytes,), (_STEP_BYTES, height), SWIZZLE_128B)
    if given.scales is None:
        maps += bytes(TENSOR_MAP_BYTES)
    else:
        blocks, pitch = given.scales.shape
        maps += tensor_map(given.scales.data_ptr(), 4, (pitch, blocks), (4 * pitch,), (layer.places + 4, 1))
    scales = output.scales
    arguments = (
        ctypes.create_string_buffer(maps, len(maps)),
        *(ctypes.c_void_p(table.data_ptr()) for table in tables),
        _Given(
            None if weight_scales is None else weight_scales.data_ptr(),
            None if routing is None else routing.data_ptr(),
            output.rows.data_ptr(),
            None if scales is None else scales.data_ptr(),
            0 if scales is None else scales.shape[1],
        ),
    )
    device = weights.get_device()
    kernel(layer, device).launch(processors // 2 * 2, current_stream(device), arguments)


@lru_cache
def kernel(layer: Layer, device: int) -> Kernel:  # noqa: ARG001 - a module is loaded for one device, the current one
    """Return the kernel of a product, compiled if the cache does not have it."""
    import triton

    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    return Kernel(compiled(source(layer), _ARCHITECTURE, folder), layer.name, THREADS, layer.shared_bytes)


def source(layer: Layer) -> str:
    """Return the complete source of a product's kernel."""
    constants = {
        "NAME": layer.name,
        "STAGE": layer.stage,
        "FP8": int(layer.fp8),
        "ROW_BYTES": layer.row_bytes,
        "COLUMNS": layer.columns,
        "LOCAL": layer.local,
        "DEPTH": layer.depth,
        "PLACES": layer.places,
        "SHARED_BYTES": layer.shared_bytes,
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    widths = [width for width in range(16, layer.places + 1, 8) if width >= 64 or width % 16 == 0]  # noqa: PLR2004
    products = "".join(_product(width, fp8=layer.fp8) for width in widths)
    here = Path(__file__)
    instructions, text = (path.read_text() for path in (here.with_name("hopper.cu"), here.with_suffix(".cu")))
    return f"{defines}template <int WIDTH> struct Product;\n{products}{instructions}{text}"


def _product(width: int, *, fp8: bool) -> str:
    """Return the C++ of one wgmma of 64 rows by `width` columns and 32 bytes of K."""
    sums = width // 2
    registers = ", ".join(f"%{number}" for number in range(sums))
    operands = ", ".join(f'"+f"(d[{number}])' for number in range(sums))
    kind, last = ("k32.f32.e4m3.e4m3", "p, 1, 1") if fp8 else ("k16.f32.bf16.bf16", "p, 1, 1, 0, 0")
    return (
        f"template <> struct Product<{width}> {{\n"
        f"static __device__ __forceinline__ void add(float (&d)[{sums}], unsigned long long left, "
        "unsigned long long right, int more) {\n"
        f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{sums + 2}, 0; '
        f"wgmma.mma_async.sync.aligned.m64n{width}{kind} "
        f'{{{registers}}}, %{sums}, %{sums + 1}, {last}; }}" '
        f': {operands} : "l"(left), "l"(right), "r"(more)); }}\n}};\n'
    )


def _weight_map(layer: Layer, weights: Tensor) -> bytes:
    """Return the map that loads 128 rows of weights in one go.

    Its dimensions are columns, 8 rows, 2 of these, groups of 16 rows, and matrices: for stage 1 gate and up of each
    expert. A multiplier's thread holds rows r and r + 8 of a group. Where it stores e4m3, these are neighbours, so that
    they make a pair of bytes.
    """
    pairs = layer.fp8 and layer.stage == 1
    row = layer.row_bytes
    matrices = weights.shape[0] * weights.shape[1] // layer.columns
    return tensor_map(
        weights.data_ptr(),
        1,
        (row, 8, 2, layer.columns // _GROUP, matrices),
        (2 * row if pairs else row, row if pairs else 8 * row, _GROUP * row, layer.columns * row),
        (_STEP_BYTES, 8, 2, 8, 1),
        SWIZZLE_128B,
    )
