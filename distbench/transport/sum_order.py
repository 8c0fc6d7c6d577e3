"""Order in which combine adds the contributions of a token."""

from __future__ import annotations

from typing import NamedTuple


class SumOrder(NamedTuple):
    """Order in which a transport adds a token's contributions: in float32 from +0.0, in the order of top-k slots.

    A rank takes the place of its first slot, of its last, or of its number among the ranks. With `node_ranks`, each
    node of that many ranks has its sum rounded first, and the nodes' sums are added in node order. `quantised` rows are
    not added as they were returned.
    """

    last_slot: bool = False
    node_ranks: int = 0
    quantised: bool = False
    by_rank: bool = False
