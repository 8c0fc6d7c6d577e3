#!/usr/bin/env python3
"""Compare the chance that `distbench advise` prints with simulated steps, token by token.

Each token draws experts one after the other, by their weights, until it has k distinct ones. A limit is exceeded where
the fullest rank of a step receives more rows. Written for docs/measurements: prints a Markdown table of the limits that
100 to 10 % of the steps exceed.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from numpy.typing import NDArray

from distbench.tools.advise.chance import Batch, chance_above, traffic_of
from distbench.tools.advise.hits import hit_chances, round_robin

EXPERTS, RANKS, TOPK = 32, 8, 4
STEPS_AT_ONCE = 20_000


def routings(num_experts: int = EXPERTS, ranks: int = RANKS, seed: int = 1) -> dict[str, NDArray[np.float64]]:
    """Weights of the experts by name, float64 [E]."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_experts) + 1.0
    hot = np.ones(num_experts)
    hot[: num_experts // ranks] = 3.0
    two = hot.copy()
    two[-(num_experts // ranks) :] = 5.0
    return {
        "uniform": np.ones(num_experts),
        "zipf 0.8": order**-0.8,
        "zipf 1.2": order**-1.2,
        "one hot rank": hot,
        "two hot ranks": two,
    }


def fullest_rows(
    weights: NDArray[np.float64], layer: tuple[int, int], tokens: int, steps: int, seed: int
) -> NDArray[np.int64]:
    """Steps by the rows of their fullest rank, int64 [tokens + 1]; `layer`: k and W, `tokens`: those of all ranks."""
    topk, ranks = layer
    rng = np.random.default_rng(seed)
    counts = np.zeros(tokens + 1, dtype=np.int64)
    for start in range(0, steps, STEPS_AT_ONCE):
        size = min(STEPS_AT_ONCE, steps - start)
        chosen = _chosen(weights, topk, size * tokens, rng)
        local = len(weights) // ranks
        mask = (1 << local) - 1
        rows = [(((chosen >> (rank * local)) & mask) != 0).reshape(size, tokens).sum(axis=1) for rank in range(ranks)]
        counts += np.bincount(np.max(rows, axis=0), minlength=tokens + 1)
    return counts


def _chosen(weights: NDArray[np.float64], topk: int, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Experts of each token as bits, int64 [tokens]; at most 63 experts."""
    edges = np.cumsum(weights / weights.sum())
    edges[-1] = 1.0
    chosen = np.zeros(tokens, dtype=np.int64)
    counts = np.zeros(tokens, dtype=np.int64)
    waiting = np.arange(tokens)
    while waiting.size:
        bit = np.left_shift(1, np.searchsorted(edges, rng.random(waiting.size), side="right"))
        fresh = (chosen[waiting] & bit) == 0
        chosen[waiting] |= bit
        counts[waiting] += fresh
        waiting = waiting[counts[waiting] < topk]
    return chosen


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=8, help="of each rank")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    tokens = RANKS * options.tokens
    sys.stdout.write(
        "| routing | limit | steps above it | chance by advise, times the steps | ratio |\n|---|---|---|---|---|\n"
    )
    for name, weights in routings().items():
        counts = fullest_rows(weights, (TOPK, RANKS), tokens, options.steps, options.seed)
        groups = hit_chances(weights, TOPK, round_robin(EXPERTS, EXPERTS, RANKS))
        traffic = traffic_of([groups], [Batch(tokens, options.tokens, 1.0)])
        above = options.steps - np.cumsum(counts)
        for limit in np.flatnonzero((above >= options.steps / 10_000) & (above <= options.steps / 10)):
            told = chance_above(int(limit), traffic).independent * options.steps
            seen = int(above[limit])
            sys.stdout.write(f"| {name} | {limit} | {seen:,} | {told:,.0f} | {told / seen:.2f} |\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
