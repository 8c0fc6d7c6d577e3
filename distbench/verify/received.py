"""What a rank tells of rows that it received wrong, so that rank 0 can tell who spoilt them: sender or receiver."""

from __future__ import annotations

from torch import Tensor

from distbench.verify.bitwise import row_digests
from distbench.verify.records import LISTED_TOKENS, WrongRow
from distbench.workload.batch import TokenBatch
from distbench.workload.kinds import ExpertGroup
from distbench.workload.routing import destinations


def wrong_rows(  # noqa: PLR0913 - which rows, and the two sides
    sources: Tensor, slots: Tensor, wrong: Tensor, actual: TokenBatch, expected: TokenBatch, group: ExpertGroup
) -> tuple[dict[int, int], list[WrongRow]]:
    """Return how many of the rows `wrong` [m] came from each source rank, and the first of them.

    `sources` [m, 2] and `expected` are in canonical order, in which the rows of `actual` have their `slots` [m].
    """
    places = wrong.nonzero().flatten()
    ranks, counts = sources[places, 0].unique(return_counts=True)
    by_source = dict(zip(ranks.tolist(), counts.tolist(), strict=True))
    listed = places[:LISTED_TOKENS]
    digests = [
        row_digests(mine[slots[listed]])[:, 0].tolist()
        for mine, right in zip(actual, expected, strict=True)
        if mine is not None and right is not None
    ]
    going = destinations(expected.ids[listed], group.experts_per_rank, group.ep_size)
    return by_source, [
        WrongRow((rank, token), list(bits), to.nonzero().flatten().tolist())
        for (rank, token), bits, to in zip(sources[listed].tolist(), zip(*digests, strict=True), going, strict=True)
    ]
