"""Rows that each rank sends to each other in one dispatch, bounded in size for the report."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from torch import Tensor
from torch.nn.functional import pad

from distbench.verify.records import SentRows

MOST_BYTES = 60 << 10
"""Most bytes of the table as JSON, so that with its other keys a report gains less than 64 KiB."""

MOST_BLOCKS = 256
"""Most rows and columns of the table."""

_NODE = 8


def sent_rows(counts: Tensor, hosts: Sequence[str]) -> SentRows:
    """Table of the agreed `counts` int64 [W, W]; ranks of a node are taken together where it would be too large.

    `hosts` has the host of each rank. A block is then one node, or the next power of two of nodes that fits.
    """
    ranks_per_block, grown = 1, _ranks_of_a_node(hosts)
    while True:
        if len(hosts) <= MOST_BLOCKS * ranks_per_block:
            rows = _summed(counts, ranks_per_block).tolist()
            if len(msgspec.json.encode(rows)) <= MOST_BYTES:
                return SentRows(ranks_per_block=ranks_per_block, rows=rows)
        ranks_per_block, grown = grown, 2 * grown


def _ranks_of_a_node(hosts: Sequence[str]) -> int:
    """Ranks of the first host, where all hosts have as many and there are several; else those of a usual node."""
    first = hosts.count(hosts[0])
    return first if 1 < first < len(hosts) and len(hosts) % first == 0 else _NODE


def _summed(counts: Tensor, ranks: int) -> Tensor:
    """Sums over blocks of `ranks` x `ranks`, int64 [ceil(W / ranks)] * 2."""
    missing = -counts.shape[0] % ranks
    whole = pad(counts, (0, missing, 0, missing))
    blocks = whole.shape[0] // ranks
    return whole.view(blocks, ranks, blocks, ranks).sum((1, 3))
