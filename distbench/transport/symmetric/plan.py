"""A rank's symmetric memory: control words, the receive buffer, and the rows that peers read in combine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distbench.workload.batch import TokenBatch

CONTROL_WORDS = 256
"""Int32 words in front: 32 of the rank's own and its counters, then two arrival words for each rank."""
MOST_RANKS = 32
"""The kernels keep a token's ranks in one 32-bit word."""

_ALIGNED_BYTES = 256
_WORD_BYTES = 4


class Plan(NamedTuple):
    """Byte offsets of the regions, alike on every rank, and the size of all; scales is 0 where rows have none.

    `hidden`, `scales`, `weights` and `ids` have R rows as in `Dispatched`, `sources` int32 [R] has the source of each
    row (rank * M + token), and `returns` [R, H] the experts' rows of at most `return_bytes` an element.
    """

    hidden: int
    scales: int
    weights: int
    ids: int
    sources: int
    returns: int
    size: int


def plan_memory(capacity: int, like: TokenBatch, return_bytes: int) -> Plan:
    """Return the plan of a receive buffer of `capacity` rows like those of `like`."""
    columns = like.hidden.shape[1]
    sizes = {
        "hidden": capacity * _row_bytes(like.hidden),
        "scales": 0 if like.scales is None else capacity * _row_bytes(like.scales),
        "weights": capacity * _row_bytes(like.weights),
        "ids": capacity * _row_bytes(like.ids),
        "sources": capacity * _WORD_BYTES,
        "returns": capacity * columns * return_bytes,
    }
    offsets, end = {}, CONTROL_WORDS * _WORD_BYTES
    for name, size in sizes.items():
        offsets[name] = end if size else 0
        end += -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
    return Plan(**offsets, size=end)


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.element_size()
