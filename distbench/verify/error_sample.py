"""The sample of tokens that errors are measured of, and what ranks exchange of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.experts.base import ExpertWeights
from distbench.experts.roundings import Roundings
from distbench.verify.combine_model import Contributions
from distbench.verify.ideal import Ideal
from distbench.workload.batch import TokenBatch
from distbench.workload.bits import positive_words
from distbench.workload.inputs import Workload
from distbench.workload.routing import token_keys

_MOST_TOKENS = 256
_MOST_ON_CPU, _LEAST_TOKENS = 128, 48
_CPU_OPERATIONS = 4e10


class Sample(NamedTuple):
    """Sampled tokens of all ranks that have an expert here, by (rank, token): keys [m], and their rows.

    `own` [s] are this rank's tokens.
    """

    keys: Tensor
    batch: TokenBatch
    own: Tensor


class Load(NamedTuple):
    """What a rank computes of a sample by itself: exact rows and, by side, families and ideal rows.

    `parts` [m, .] travel to the tokens' owners: the exact rows, and for each side rows, bf16 variances and orders.
    """

    sides: list[str]
    measured: dict[str, Roundings]
    exact: Tensor
    ideals: list[Ideal]
    parts: list[Tensor]

    def packed(self) -> Tensor:
        """Return the bytes of all parts, uint8 [m, b]; b is even."""
        return torch.cat([part.contiguous().view(torch.uint8) for part in self.parts], dim=1)


class SampleRider:
    """The first sample's rows, which travel with those that combine is checked with; see `combine_check.Rider`."""

    def __init__(self, load: Load, keys: Tensor, take: Callable[[Contributions], list[int]]) -> None:
        self.load, self.keys, self.rows = load, keys, load.packed().view(torch.bfloat16)
        self.far: list[int] | None = None
        self.anywhere = False
        self._take = take

    def arrive(self, laid: Contributions) -> bool:
        """See `Rider.arrive`."""
        self.far = self._take(laid)
        return bool(self.far)

    def told(self, *, anywhere: bool) -> None:
        """See `Rider.told`."""
        self.anywhere = anywhere


def own_rows(tokens: Tensor, sample: Sample) -> Tensor:
    """Return the sample's rows of this rank's tokens [n, H]; without a copy where they are all."""
    return tokens if len(sample.own) == len(tokens) else tokens.index_select(0, sample.own)


def sampled_tokens(workload: Workload, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Return the source ranks and tokens of the sample, int64 [s] each, sorted; the same on every rank."""
    device = workload.device
    counts = torch.tensor(workload.tokens_per_rank, device=device)
    ranks = torch.arange(len(counts), device=device).repeat_interleave(counts)
    tokens = torch.arange(len(ranks), device=device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    most = sample_size(workload, weights)
    if len(ranks) <= most:
        return ranks, tokens
    order = positive_words(workload.seed, "errors", token_keys(ranks, tokens), 1, device).squeeze(1)
    chosen = order.argsort(stable=True)[:most].sort().values
    return ranks[chosen], tokens[chosen]


def sample_size(workload: Workload, weights: ExpertWeights) -> int:
    """Return the number of sampled tokens: hundreds, fewer where a CPU would take seconds."""
    if workload.device.type != "cpu":
        return _MOST_TOKENS
    operations = 8 * workload.group.topk * (weights.w1.shape[1:].numel() + weights.w2.shape[1:].numel())
    return max(min(int(_CPU_OPERATIONS / operations), _MOST_ON_CPU), _LEAST_TOKENS)
