"""The first difference of two sets of rows, as a record."""

from __future__ import annotations

from torch import Tensor

from distbench.verify.bitwise import bits_at, differing, same_bits
from distbench.verify.records import Divergence


def first_difference(  # noqa: PLR0913 - the names of a place and the two sides
    stage: str, arm: str, rank: int, field: str, against: str, actual: Tensor, expected: Tensor
) -> Divergence | None:
    """Return the first difference of rows [n, H] from the expected ones; None where all agree; `row` is its index."""
    if same_bits(actual, expected):
        return None
    return difference(stage, arm, rank, field, against, actual, expected)


def difference(  # noqa: PLR0913 - the names of a place and the two sides
    stage: str, arm: str, rank: int, field: str, against: str, actual: Tensor, expected: Tensor
) -> Divergence:
    """Return the first difference of rows [n, H] that are known to differ."""
    wrong = differing(actual, expected)
    row, column = divmod(int(wrong.flatten().int().argmax()), wrong.shape[1])
    return Divergence(
        stage=stage,
        arm=arm,
        rank=rank,
        row=row,
        column=column,
        expected_bits=bits_at(expected, row, column),
        actual_bits=bits_at(actual, row, column),
        field=field,
        against=against,
        rows=int(wrong.any(1).sum()),
    )
