"""Chance that a step exceeds a limit: a bound for any joint choice, and a figure for independent tokens.

A token sends at most one row to a rank. So with N tokens of a step, of which a rank has n itself, a rank receives
n + Binomial(N - n, q) rows where every token keeps a row on its own rank, else Binomial(N, q), if tokens choose alike
and independently; q is the chance that a token chooses the rank (hits.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distbench.tools.advise.hits import Groups

Floats = NDArray[np.float64]

MARGIN = 2.0
"""Factor on the figure for independent tokens: 10^6 simulated steps, of which 100 exceed a limit, may show 1.5 times
their chance (five standard deviations), and a histogram is a sample too."""
_LEAST = 1e-320
"""Chance of what is possible, where a float has no smaller one."""
_ABOVE_S, _BELOW_S, _MORE = 12.0, 9.0, 40
"""Standard deviations above and below the highest mean, and rows more; others have chances below 1e-16."""


class Batch(NamedTuple):
    """Steps with the same number of tokens: N of all ranks, the most of one rank, and the share of all steps."""

    total: int
    most: int
    share: float


class Traffic(NamedTuple):
    """Ranks of each layer by chance, steps by size; `own` is 1 where every token keeps a row on its own rank.

    `chances` float64 [C] are the distinct ones over all layers, `counts` int64 [C] the ranks and layers that have each.
    """

    layers: Sequence[Groups]
    batches: Sequence[Batch]
    own: int
    chances: Floats
    counts: NDArray[np.int64]

    def free(self, batch: Batch) -> tuple[int, int]:
        """Tokens that may or may not come to the fullest sender, and rows that it keeps anyway."""
        kept = batch.most * self.own
        return batch.total - kept, kept


def traffic_of(layers: Sequence[Groups], batches: Sequence[Batch], own: int = 0) -> Traffic:
    """Traffic of these layers and steps."""
    alike: dict[int, tuple[Groups, int]] = {}
    for groups in layers:
        alike[id(groups)] = (groups, alike.get(id(groups), (groups, 0))[1] + 1)
    every = np.concatenate([groups.chances for groups, _ in alike.values()])
    sizes = np.concatenate([groups.sizes * count for groups, count in alike.values()])
    chances, place = np.unique(every, return_inverse=True)
    counts = np.zeros(len(chances), dtype=np.int64)
    np.add.at(counts, place, sizes)
    return Traffic(layers, batches, own, chances, counts)


class Chance(NamedTuple):
    """Chances that a step exceeds a limit, at most 1: over all ranks and layers."""

    any_joint: float
    """Bound for any joint choice of the tokens in which a token chooses each rank with its chance (Markov)."""
    independent: float
    """Twice the sum over ranks and layers of a bound on the binomial tail."""


def chance_above(limit: int, traffic: Traffic) -> Chance:
    """Chance that in a step some rank of some layer receives more than `limit` rows."""
    joint = independent = 0.0
    for batch in traffic.batches:
        tokens, kept = traffic.free(batch)
        least = limit + 1 - kept  # rows of others with which the limit is exceeded
        if least > tokens:
            continue
        mean, tail = math.inf, math.inf
        if least > 0:
            mean = float(traffic.counts @ traffic.chances) * tokens
            tail = float(traffic.counts @ tail_bounds(least, tokens, traffic.chances))
            tail = max(tail, _LEAST) if traffic.chances.any() else tail
        joint += batch.share * min(mean / max(least, 1), 1.0)
        independent += max(batch.share * min(MARGIN * tail, 1.0), _LEAST * (tail > 0))
    return Chance(min(joint, 1.0), min(independent, 1.0))


def tail_bounds(least: int, tokens: int, chances: Floats) -> Floats:
    """Bounds of P(Binomial(tokens, q) >= least) for each q, float64 [G]; 1 where `least` is at most the mean.

    Successive terms beyond `least` fall at least as fast as the first two, so the tail is below a geometric series.
    """
    bounds = np.where(chances > 0, 1.0, 0.0)
    far = (least > tokens * chances) & (chances > 0)
    if not far.any():
        return bounds
    q = chances[far]
    first = log_choose(tokens, least) + least * np.log(q) + (tokens - least) * np.log1p(-q)
    ratio = (tokens - least) / (least + 1) * q / (1 - q)
    bounds[far] = np.minimum(np.exp(first) / (1 - ratio), 1.0)
    return bounds


def log_choose(n: int, k: int) -> float:
    """Natural logarithm of n over k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def smallest_limit(target: float, traffic: Traffic) -> int:
    """Smallest limit that a step exceeds with a chance of at most `target`, for independent tokens."""
    low, high = 0, max((batch.total for batch in traffic.batches), default=0)
    while low < high:
        middle = (low + high) // 2
        if chance_above(middle, traffic).independent <= target:
            high = middle
        else:
            low = middle + 1
    return low


class Law(NamedTuple):
    """Law of the fullest rank's rows in a step of one size: P(at most first + i) = below[i], float64 [X]."""

    first: int
    below: Floats


def fullest_law(traffic: Traffic, batch: Batch) -> Law:
    """Law of the most rows that a rank of any layer receives, ranks and layers independent of each other."""
    tokens, kept = traffic.free(batch)
    first, last = _window(tokens, traffic.chances)
    near = _reach(tokens, traffic.chances) >= first
    above = _above(tokens, traffic.chances[near], first, last)
    return Law(first + kept, np.exp(traffic.counts[near] @ np.log1p(-np.minimum(above, 1 - 1e-16))))


def fullest_place(traffic: Traffic, batch: Batch, rows: int) -> tuple[int, int]:
    """Layer and rank that most likely have the `rows` rows of the fullest rank; the first of several alike."""
    tokens, kept = traffic.free(batch)
    least = rows - kept
    best, place = -1.0, (0, 0)
    for layer, groups in enumerate(traffic.layers):
        tails = tail_bounds(least, tokens, groups.chances) if least > 0 else np.ones(len(groups.chances))
        top = int(tails.argmax())
        if tails[top] > best:
            best, place = float(tails[top]), (layer, int(np.flatnonzero(groups.group == top)[0]))
    return place


def _window(tokens: int, chances: Floats) -> tuple[int, int]:
    """First and last number of rows that the fullest rank may have."""
    first = (tokens * chances - _BELOW_S * np.sqrt(tokens * chances * (1 - chances))).max() - _MORE
    return max(int(first), 0), min(math.ceil(_reach(tokens, chances).max()), tokens)


def _reach(tokens: int, chances: Floats) -> Floats:
    """Rows above which a rank's chance is below 1e-16, float64 [G]."""
    return np.asarray(tokens * chances + _ABOVE_S * np.sqrt(tokens * chances * (1 - chances)) + _MORE)


def _above(tokens: int, chances: Floats, first: int, last: int) -> Floats:
    """P(Binomial(tokens, q) > x) for each q and each x of the window, float64 [G, X]."""
    q = np.clip(chances, 1e-300, 1 - 1e-16)[:, None]
    rows = np.arange(first, last)
    steps = np.log((tokens - rows) / (rows + 1.0)) + np.log(q / (1 - q))
    start = log_choose(tokens, first) + first * np.log(q) + (tokens - first) * np.log1p(-q)
    chance = np.exp(np.concatenate([start, start + np.cumsum(steps, axis=1)], axis=1))
    tails = np.cumsum(chance[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([tails[:, 1:], np.zeros((len(q), 1))], axis=1)
