"""A rank's evidence on rows that it received wrong, from which rank 0 finds the culprit: sender or receiver."""

from __future__ import annotations

from torch import Tensor

from distbench.verify.bitwise import row_digests
from distbench.verify.records import LISTED_TOKENS, WrongRow
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations
from distbench.workload.routing_spec import ExpertGroup

_FIELD_FACTOR = 31
_EXACT_IN_JSON = (1 << 53) - 1


def wrong_rows(  # noqa: PLR0913 - the rows and the two sides
    sources: Tensor, slots: Tensor, wrong: Tensor, actual: TokenBatch, expected: TokenBatch, group: ExpertGroup
) -> tuple[dict[int, int], list[WrongRow]]:
    """Return the number of the rows `wrong` [m] from each source rank, and the first of them.

    `sources` [m, 2] and `expected` are in canonical order; `slots` [m] are the positions of their rows in `actual`.
    """
    places = wrong.nonzero().flatten()
    ranks, counts = sources[places, 0].unique(return_counts=True)
    by_source = dict(zip(ranks.tolist(), counts.tolist(), strict=True))
    listed = places[:LISTED_TOKENS]
    bits = listed.new_zeros(len(listed))
    for mine, right in zip(actual, expected, strict=True):
        if mine is not None and right is not None:
            bits = bits * _FIELD_FACTOR + row_digests(mine[slots[listed]])[:, 0]
    going = destinations(expected.ids[listed], group.experts_per_rank, group.ep_size)
    return by_source, [
        WrongRow((rank, token), digest, to.nonzero().flatten().tolist())
        for (rank, token), digest, to in zip(
            sources[listed].tolist(), (bits & _EXACT_IN_JSON).tolist(), going, strict=True
        )
    ]
