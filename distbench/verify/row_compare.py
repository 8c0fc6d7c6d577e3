"""Equality of bits, never of values: -0.0 is not 0.0, and the payload of a NaN counts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from distbench.utils.tensor_memory import same_memory
from distbench.verify.records import NO_DIFFERENCE, Divergence, RowComparison
from distbench.workload.chunking import rows_at_a_time

_INTEGER_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGEST_CHUNK_BYTES = 32 << 20


def integer_view(tensor: Tensor) -> Tensor:
    """Return the same bits as integers of the same width."""
    return tensor.view(_INTEGER_VIEWS[tensor.element_size()])


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits."""
    same = same_memory(actual, expected)
    return torch.equal(*_words(actual, expected)) if same is None else same


def same_bits_each(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Return `same_bits` of each pair; the host waits for a device once, not for each."""
    if not pairs or pairs[0][0].device.type == "cpu":
        return [same_bits(*pair) for pair in pairs]
    differ = [(actual != expected).any() for actual, expected in (_words(*pair) for pair in pairs)]
    return [not one for one in torch.stack(differ).tolist()]


def _words(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as integers, of 64 bits where rows are whole words: these compare several times faster."""
    try:
        return actual.view(torch.int64), expected.view(torch.int64)
    except RuntimeError:
        return integer_view(actual), integer_view(expected)


def differing(actual: Tensor, expected: Tensor) -> Tensor:
    """Return a mask of the elements whose bits differ, bool [n, H]."""
    return integer_view(actual) != integer_view(expected)


def compare_rows(actual: Tensor, expected: Tensor) -> RowComparison:
    """Compare two tensors [n, H] of one dtype."""
    if same_bits(actual, expected):
        return NO_DIFFERENCE
    wrong = differing(actual, expected)
    distance = (_ordered(actual[wrong]) - _ordered(expected[wrong])).abs()
    return RowComparison(int(wrong.any(1).sum()), int(wrong.sum()), max(int(distance.max()), 1))


def bits_at(tensor: Tensor, row: int, column: int) -> str:
    """Return one element's bits as hex digits."""
    width = tensor.element_size()
    value = int(integer_view(tensor)[row, column])
    return f"0x{value & ((1 << (8 * width)) - 1):0{2 * width}x}"


def row_digests(rows: Tensor) -> Tensor:
    """Return a 128-bit digest of each row, int64 [n, 2], that depends on every bit and on its column.

    Multilinear hashing over the row's integer words with odd 64-bit keys (Carter and Wegman; Lemire and Kaser,
    "Strongly universal string hashing is fast"): changing one element of a row always changes its digest.
    """
    words, keys = integer_view(rows).unsqueeze(1), _digest_keys(rows.shape[1], rows.device)
    step = rows_at_a_time(_DIGEST_CHUNK_BYTES, rows.shape[1] * 16, rows.device)
    if len(rows) <= step:
        return (words * keys).sum(2)
    return torch.cat([(part * keys).sum(2) for part in words.split(step)])


def word_digests(words: Tensor) -> Tensor:
    """Return a 64-bit digest of each row of integer words [n, w], int64 [n]: the first of `row_digests`."""
    keys = _digest_keys(words.shape[1], words.device)[0]
    step = rows_at_a_time(_DIGEST_CHUNK_BYTES, words.shape[1] * 8, words.device)
    if len(words) <= step:
        return (words * keys).sum(1)
    return torch.cat([(part * keys).sum(1) for part in words.split(step)])


def tensor_digest(digests: Tensor) -> str:
    """Return one digest, 32 hex digits, of rows and their order, from the digests of the rows, int64 [n, 2]."""
    content = digests.cpu().contiguous().numpy().astype("<i8", copy=False)
    return hashlib.sha256(content.data).hexdigest()[:32]


@lru_cache(maxsize=16)
def _digest_keys(columns: int, device: torch.device) -> Tensor:
    content = hashlib.shake_256(b"distbench/digest").digest(16 * columns)
    keys = torch.frombuffer(bytearray(content), dtype=torch.int64) | 1
    return keys.view(2, columns).to(device)


def _ordered(values: Tensor) -> Tensor:
    bits = integer_view(values).long()
    magnitude = bits & ((1 << (8 * values.element_size() - 1)) - 1)
    return torch.where(bits == magnitude, magnitude, -magnitude)


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


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return each row's largest error, float32 [n], as a share of the largest magnitude expected; NaN with a NaN."""
    error = (actual.float() - expected.float()).abs().amax(1)
    scale = expected.float().abs().amax(1)
    return torch.where(error == 0, 0.0, error / scale)


def relative_error(actual: Tensor, expected: Tensor) -> float | None:
    """Return the worst of `row_errors`; None where it is NaN or infinite."""
    if torch.equal(actual, expected):
        return 0.0
    worst = float(row_errors(actual, expected).max())
    return worst if math.isfinite(worst) else None


def far_rows(actual: Tensor, expected: Tensor, allowed: float) -> int:
    """Count rows [n, H] further than `allowed` from the expected rows, or with a NaN that these do not have."""
    return int((~(row_errors(actual, expected) <= allowed)).sum())
