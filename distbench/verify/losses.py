"""Tokens that lost a row to a limit below total_recv: only their damage is due to the limit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case.stages import CUT_ARMS
from distbench.distributed.waits import collective
from distbench.verify.gather import Outputs
from distbench.verify.pairs import pair_name, pairs_of
from distbench.verify.records import ORACLE, ResolvedCase, Survivors
from distbench.verify.row_compare import differing


class Losses:
    """A rank's own tokens that lost a row on any rank, by arm; empty where the case does not ask for lost rows."""

    def __init__(self, group: dist.ProcessGroup, resolved: ResolvedCase, rank: int) -> None:
        self._group = group
        tokens = resolved.traffic.tokens
        first = sum(tokens[:rank])
        self._lossy = resolved.lossy
        self._of_ranks = tokens
        self._own = slice(first, first + tokens[rank])
        self._taken: dict[str, Tensor] = {}

    def take(self, arm: str, beyond: Tensor) -> None:
        """Record this rank's losses in a pass of `arm`: the sources int64 [l, 2] of rows past the limit."""
        if not self._lossy or arm not in CUT_ARMS:
            return
        tokens = torch.tensor(self._of_ranks)
        rank, token = beyond.cpu().unbind(1)
        known = (rank >= 0) & (rank < len(tokens)) & (token >= 0)
        rank, token = rank[known], token[known]
        known = token < tokens[rank]
        flags = torch.zeros(sum(self._of_ranks), dtype=torch.uint8)
        flags[((tokens.cumsum(0) - tokens)[rank] + token)[known]] = 1
        self._taken[arm] = flags

    def share(self) -> dict[str, Tensor]:
        """Return the rank's own tokens that lost a row in the passes taken since the last call: arm to bool [n].

        Collective where the case asks for lost rows: one byte for each token of all ranks.
        """
        found = {}
        for arm, flags in self._taken.items():
            with collective("all_reduce"):
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
            found[arm] = flags[self._own].bool()
        self._taken = {}
        return found


def surviving(rows: Tensor, lost: Tensor | None) -> Tensor:
    """Rows [n, .] of the tokens that lost nothing; `lost` bool [n], or None where none did."""
    return rows if lost is None else rows[~lost.to(rows.device)]


def survivors(made: Outputs, lost: dict[str, Tensor]) -> Survivors:
    """Count the wrong tokens of a rank that lost no row; for a pair of arms, in neither of them."""
    rows = dict(zip(made.arms, made.rows.unbind(1), strict=True))
    nan_tokens = {
        arm: int(surviving(tokens, lost.get(arm)).isnan().any(1).sum()) for arm, tokens in rows.items() if arm != ORACLE
    }
    differ = {}
    for first, second in pairs_of(made.arms):
        kept = _neither(lost.get(first), lost.get(second))
        wrong = differing(surviving(rows[second], kept).contiguous(), surviving(rows[first], kept).contiguous())
        differ[pair_name((first, second))] = int(wrong.any(1).sum())
    return Survivors(nan_tokens, differ)


def _neither(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first | second
