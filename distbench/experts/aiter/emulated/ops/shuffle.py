"""Weight layout of the kernels."""

from __future__ import annotations

from torch import Tensor

_BYTES = 16


def shuffle_weight(x: Tensor, layout: tuple[int, int] = (16, 16), use_int4: bool = False) -> Tensor:  # noqa: FBT001, FBT002 - aiter's
    """Return `x` [..., N, K] in tiles of `layout`, same shape, marked as shuffled.

    Raises:
        AssertionError: N is not a multiple of layout[0], or K not of twice layout[1].
    """
    if use_int4:
        message = "shuffle_weight (emulated): int4 is not imitated"
        raise NotImplementedError(message)
    tiles = _tiles(x, layout)
    shuffled = tiles.permute(0, 1, 3, 4, 2, 5).contiguous().view(x.shape)
    shuffled.is_shuffled = True  # type: ignore[attr-defined]  # as aiter marks it
    return shuffled


def unshuffled(x: Tensor) -> Tensor:
    """Return the weights that a kernel sees in `x`: the inverse of `shuffle_weight`, even if `x` was not shuffled."""
    count, rows, lanes, columns, groups, pack = _tiles(x, (16, 16)).shape
    return x.reshape(count, rows, columns, groups, lanes, pack).permute(0, 1, 4, 2, 3, 5).reshape(x.shape)


def _tiles(x: Tensor, layout: tuple[int, int]) -> Tensor:
    rows, columns = layout[0], layout[1] * 2
    pack = _BYTES // x.element_size()
    assert x.shape[-2] % rows == 0, f"{x.shape[-2]} % {rows} == {x.shape[-2] % rows}"  # noqa: S101 - aiter's
    assert x.shape[-1] % columns == 0, f"{x.shape[-1]} % {columns} == {x.shape[-1] % columns}"  # noqa: S101
    return x.reshape(-1, x.shape[-2] // rows, rows, x.shape[-1] // columns, columns // pack, pack)
