"""The table of rows sent: whole where it is small, by blocks of ranks where not, never a row lost."""

from __future__ import annotations

import msgspec
import pytest
import torch

from distbench.pipeline.sent_rows import MOST_BLOCKS, MOST_BYTES, sent_rows

GAIN = 64 << 10


@pytest.mark.parametrize(
    ("ranks", "nodes", "most", "block"),
    [
        (1, 1, 9, 1),
        (8, 1, 16384, 1),
        (64, 8, 16384, 1),
        (128, 16, 99, 1),
        (128, 16, 9999, 8),
        (256, 32, 9, 8),
        (1024, 256, 9999, 16),
        (1024, 1, 9, 16),
        (100, 25, 10**9, 4),
        (130, 1, 9999, 8),
    ],
)
def test_table_holds_all_rows_within_its_bytes(ranks: int, nodes: int, most: int, block: int) -> None:
    counts = torch.randint(most // 10 + 1, most + 1, (ranks, ranks), generator=torch.Generator().manual_seed(ranks))
    found = sent_rows(counts, [f"node{rank * nodes // ranks}" for rank in range(ranks)])
    assert found.ranks_per_block == block
    assert len(found.rows) == -(-ranks // block) <= MOST_BLOCKS
    assert sum(map(sum, found.rows)) == int(counts.sum())
    assert found.rows[-1][0] == int(counts[(len(found.rows) - 1) * block :, :block].sum())
    assert found.rows[0][-1] == int(counts[:block, (len(found.rows) - 1) * block :].sum())
    assert len(msgspec.json.encode(found.rows)) <= MOST_BYTES
    assert len(msgspec.json.encode(found)) < GAIN
