"""A packed launch passes the driver what Triton's own launcher would, or is refused."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distbench.utils import cuda_kernels, packed_launch
from distbench.utils.cuda_kernels import Refused
from distbench.utils.packed_launch import PackedLaunch
from distbench.utils.triton_launch import Launch, _Compiled

ROWS, MATRIX = torch.zeros(64), torch.zeros(32, 8)
SIGNATURE = {
    "rows": "*fp32",
    "missing": "constexpr",
    "matrix": "tensordesc<fp32[16, 8]>",
    "count": "i32",
    "N": "constexpr",
}
SIZES = [8, 128, 4, 4, 8, 8, 4, 8, 8]


class Driver:
    """Fake of cuda.bindings.driver that keeps the arguments of the last launch as bytes."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self.launched: tuple[Any, ...] = ()

    def CUfunction(self, handle: int) -> int:  # noqa: N802 - the driver's name
        return handle

    def cuFuncGetParamInfo(self, _: int, number: int) -> tuple[int, int, int]:  # noqa: N802
        return (0, 0, self._sizes[number]) if number < len(self._sizes) else (1, 0, 0)

    def cuLaunchKernel(self, *arguments: int) -> tuple[int]:  # noqa: N802
        where = (ctypes.c_void_p * len(self._sizes)).from_address(arguments[9])
        given = [ctypes.string_at(address, size) for address, size in zip(where, self._sizes, strict=True)]
        self.launched = *arguments[:9], given
        return (0,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver(SIZES)
    monkeypatch.setattr(cuda_kernels, "_cuda", lambda _: fake)
    monkeypatch.setattr(cuda_kernels, "_launcher", lambda: fake.cuLaunchKernel)
    monkeypatch.setattr(packed_launch, "tensor_map", lambda address, *_: address.to_bytes(8, "little") * 16)
    return fake


def launch(**changes: object) -> Launch:
    layout = {"elem_size": 4, "block_size": [16, 8], "swizzle": 0, "fp4_padded": False}
    metadata = {"num_ctas": 1, "num_warps": 4, "shared": 99, "tensordesc_meta": [layout]} | changes
    kernel = SimpleNamespace(metadata=SimpleNamespace(**metadata), src=SimpleNamespace(signature=SIGNATURE))
    matrix = SimpleNamespace(base=MATRIX, shape=[32, 8], strides=[8, 1], block_shape=[16, 8])
    return Launch(_Compiled(kernel, None, 77, None, (5,)), (3, 2, 1), (ROWS, None, matrix, 9))


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def test_arguments_are_packed_in_order_and_addresses_are_set_again(driver: Driver) -> None:
    packed = PackedLaunch(launch())
    (position, pointer), (where, matrix) = packed.pointers[0], packed.maps[0]
    assert (position, where) == (0, 2)
    for address in (4096, 8192):
        pointer.value = address
        matrix.point(address + 16)
        packed.start(7)
        assert driver.launched == (
            77,
            3,
            2,
            1,
            128,
            1,
            1,
            99,
            7,
            [
                number(address, 8),
                number(address + 16, 8) * 16,
                number(32, 4),
                number(8, 4),
                number(8, 8),
                number(1, 8),
                number(9, 4),
                bytes(8),
                bytes(8),
            ],
        )


@pytest.mark.parametrize(
    "changes", [{"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 8}, {"tensordesc_meta": []}]
)
def test_kernel_that_is_launched_in_another_way_is_refused(driver: Driver, changes: dict[str, object]) -> None:
    with pytest.raises(Refused):
        PackedLaunch(launch(**changes))
    assert driver.launched == ()


@pytest.mark.parametrize("sizes", [SIZES[:-1], [*SIZES, 8], [8, 128, 8, 4, 8, 8, 4, 8, 8]])
def test_kernel_with_arguments_of_other_sizes_is_refused(
    driver: Driver, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_sizes", sizes)
    with pytest.raises(Refused):
        PackedLaunch(launch())
