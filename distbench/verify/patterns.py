"""What wrong rows look like beside the right ones, in a few words: the sort of damage, not its extent."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.verify.bitwise import differing, integer_view, row_digests, same_bits
from distbench.verify.records import POISON, SCATTERED, Clues
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload
from distbench.workload.routing import destinations

_EXAMINED = 32
_MAX_FACTOR = 64
_NODE_ROWS = 6
_FP8_MAX = 448.0


def pattern_of(actual: Tensor, expected: Tensor, pool: Tensor) -> str:
    """Return what happened to rows [m, H], all of them wrong, of which `pool` [p, H] are the right ones and others."""
    actual, expected = actual[:_EXAMINED], expected[:_EXAMINED]
    floating = actual.dtype.is_floating_point
    if floating and bool(actual.float().isnan().any(1).all()):
        return POISON
    if not bool((integer_view(actual) != 0).any()):
        return "zeros"
    if _single_bits(actual, expected):
        return "single bits flipped"
    if _all_known(actual, pool):
        return "another token's row"
    factor = _factor(actual, expected) if floating else None
    if factor is not None:
        return f"multiplied by {factor}"
    first = int(differing(actual, expected).any(0).int().argmax())
    return f"columns from {first} on" if first >= actual.shape[1] // 2 else SCATTERED


def far_sources(wrong: Tensor, everyone: Tensor, rank: int, num_ranks: int) -> str:
    """Return whether only rows of other nodes are wrong, for some number of ranks a node; else nothing.

    `wrong` and `everyone` int64 [m] are the source ranks of the wrong rows and of all.
    """
    hit, sent = set(wrong.tolist()), set(everyone.tolist())
    if wrong.numel() < _NODE_ROWS:
        return ""
    for node in range(num_ranks // 2, 1, -1):
        near = {source for source in sent if source // node == rank // node}
        if num_ranks % node == 0 and near and hit == sent - near:
            return f"only tokens that crossed nodes of {node} ranks"
    return ""


class _Share(NamedTuple):
    """What one rank contributes to some tokens of another: [n, H] each, and which tokens [n] it has a part in."""

    rank: int
    part: Tensor
    concerned: Tensor


class ShareTester:
    """Tells whose contribution to this rank's tokens is wrong, by summing them anew."""

    def __init__(self, workload: Workload, rank: int, num_ranks: int) -> None:
        """Test tokens of `rank`."""
        self._workload = workload
        self._rank = rank
        self._num_ranks = num_ranks

    def clues(self, combined: Tensor, expected: Tensor) -> Clues:
        """Return the pattern of the wrong tokens of `combined` [n, H], and the ranks whose share explains them."""
        wrong = differing(combined, expected).any(1).nonzero().flatten()
        listed = wrong[:64]
        few = wrong[:_EXAMINED]
        batch = self._workload.tokens(self._rank, few)
        going = destinations(batch.ids, self._workload.experts_per_rank, self._num_ranks)
        clues = Clues(
            tokens=[(self._rank, token) for token in listed.tolist()],
            examined=few.numel(),
            by_destination={str(rank): int(going[:, rank].sum()) for rank in going.any(0).nonzero().flatten().tolist()},
        )
        actual, right = combined[few], expected[few]
        pattern, suspects = self._explain(actual, right, batch, going)
        clues.pattern = pattern or pattern_of(actual, right, expected)
        clues.suspects = suspects
        return clues

    def _explain(self, actual: Tensor, right: Tensor, batch: TokenBatch, going: Tensor) -> tuple[str, list[int]]:
        shares = []
        for rank in going.any(0).nonzero().flatten().tolist():
            part = self._workload.expected_rows(rank, batch)
            if part is None:
                return "", []
            shares.append(_Share(rank, part.float(), going[:, rank]))
        for share in shares:
            alone = torch.where(share.concerned.unsqueeze(1), share.part, 0.0).bfloat16()
            if share.rank == self._rank and len(shares) > 1 and _same(actual, alone):
                return "only the rank's own experts contributed", [self._rank]
        for name, change in _CHANGES.items():
            for share in shares:
                changed = (right.float() + change(share.part)).bfloat16()
                if bool(share.concerned.all()) and not _same(changed, right) and _same(actual, changed):
                    return name, [share.rank]
        return "", []


_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a rank's share is missing": lambda part: -part,
    "a rank's share counts twice": lambda part: part,
    "a rank's share was cast to fp8 without a scale": lambda part: _cast(part) - part,
}


def _cast(part: Tensor) -> Tensor:
    return part.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).float()


def _same(actual: Tensor, candidate: Tensor) -> bool:
    """Whether values are equal; sums of a candidate may differ in the sign of a zero."""
    return torch.equal(actual, candidate)


def _single_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether one bit of each row differs. x & (x - 1) takes the lowest bit away; nothing is left of a single one."""
    changed = integer_view(actual) ^ integer_view(expected)
    values = changed[changed != 0]
    return bool(((changed != 0).sum(1) == 1).all()) and not bool((values & (values - 1)).any())


def _all_known(actual: Tensor, pool: Tensor) -> bool:
    known = {tuple(digest) for digest in row_digests(pool).tolist()}
    return all(tuple(digest) in known for digest in row_digests(actual).tolist())


def _factor(actual: Tensor, expected: Tensor) -> int | None:
    wide, right = actual.float(), expected.float()
    at = int(right.flatten().abs().argmax())
    base = float(right.flatten()[at])
    ratio = float(wide.flatten()[at]) / base if base else 0.0
    factor = round(ratio) if abs(ratio) <= _MAX_FACTOR else 0
    whole = factor not in (0, 1) and same_bits((right * factor).to(actual.dtype) + 0.0, actual + 0.0)
    return factor if whole else None
