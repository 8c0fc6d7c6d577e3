"""Classification of wrong rows against the right ones, in a few words: the kind of damage, not its extent."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distbench.verify.records import ANOTHER_ROW, MULTIPLIED, POISON, SCATTERED
from distbench.verify.row_compare import differing, integer_view, row_digests, same_bits

_EXAMINED = 32
_MAX_FACTOR = 64
_NODE_ROWS = 6


def pattern_of(actual: Tensor, expected: Tensor, known: Callable[[], Tensor]) -> str:
    """Return the pattern of damage of rows [m, H], all of them wrong; `known` gives digests [p, 2] of right rows."""
    actual, expected = actual[:_EXAMINED], expected[:_EXAMINED]
    floating = actual.dtype.is_floating_point
    if floating and bool(actual.float().isnan().any(1).all()):
        return POISON
    if not bool((integer_view(actual) != 0).any()):
        return "zeros"
    if _single_bits(actual, expected):
        return "single bits flipped"
    if _all_known(actual, known()):
        return ANOTHER_ROW
    factor = _factor(actual, expected) if floating else None
    if factor is not None:
        return f"{MULTIPLIED} {factor}"
    first = int(differing(actual, expected).any(0).int().argmax())
    return f"columns from {first} on" if first >= actual.shape[1] // 2 else SCATTERED


def far_sources(wrong: Tensor, everyone: Tensor, rank: int, num_ranks: int) -> str:
    """Return a pattern if, for some number of ranks per node, only rows of other nodes are wrong; else None.

    `wrong` and `everyone` int64 [m] are the source ranks of the wrong rows and of all rows.
    """
    hit, sent = set(wrong.tolist()), set(everyone.tolist())
    if wrong.numel() < _NODE_ROWS:
        return ""
    for node in range(num_ranks // 2, 1, -1):
        near = {source for source in sent if source // node == rank // node}
        if num_ranks % node == 0 and near and hit == sent - near:
            return f"only tokens that crossed nodes of {node} ranks"
    return ""


def _single_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether each row has one flipped bit: x & (x - 1) clears the lowest set bit, which leaves 0 for a single one."""
    changed = integer_view(actual) ^ integer_view(expected)
    values = changed[changed != 0]
    return bool(((changed != 0).sum(1) == 1).all()) and not bool((values & (values - 1)).any())


def _all_known(actual: Tensor, digests: Tensor) -> bool:
    known = {tuple(digest) for digest in digests.tolist()}
    return all(tuple(digest) in known for digest in row_digests(actual).tolist())


def _factor(actual: Tensor, expected: Tensor) -> int | None:
    wide, right = actual.float(), expected.float()
    at = int(right.flatten().abs().argmax())
    base = float(right.flatten()[at])
    ratio = float(wide.flatten()[at]) / base if base else 0.0
    factor = round(ratio) if abs(ratio) <= _MAX_FACTOR else 0
    whole = factor not in (0, 1) and same_bits((right * factor).to(actual.dtype).float() + 0.0, actual.float() + 0.0)
    return factor if whole else None
