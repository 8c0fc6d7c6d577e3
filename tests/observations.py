"""Synthetic records of ranks: a clean case of two ranks, which tests of the verdict damage."""

from __future__ import annotations

from typing import Any

import msgspec

from distbench.case.limits import Traffic
from distbench.case.spec import Case
from distbench.case.stages import Arm
from distbench.verify.pairs import pair_name, pairs_of
from distbench.verify.records import (
    NO_DIFFERENCE,
    ORACLE,
    ArmError,
    Divergence,
    Gathered,
    LostRows,
    Observation,
    ResolvedCase,
    RowComparison,
    TokenCounts,
)
from tests.cases import tiny_case

ARMS = tuple(Arm)
TOKENS, RECEIVED, CAPACITY = 16, 20, 128
SOME = RowComparison(3, 7, 2)


def kernel(rows: int, block_m: int = 64, mode: str = "atomic") -> dict[str, Any]:
    """A kernel in the form of records; another `block_m` is another kernel."""
    return {
        "rows": rows,
        "bucket": rows,
        "source": "heuristic",
        "block_m": block_m,
        "ksplit": 0,
        "run_1stage": False,
        "stage1": "s1",
        "stage2": "s2",
        "stage2_mode": mode,
        "tile_k1": 64,
        "tile_k2": 64,
        "label": f"H bm{block_m} {mode}",
    }


def kernels(mode: str = "atomic", truncated: int = 64) -> dict[str, dict[str, Any]]:
    """The arms' kernels: truncated runs one of `truncated` rows a block, the others of 64."""
    found = dict.fromkeys(ARMS, kernel(CAPACITY, mode=mode))
    return found | {"truncated": kernel(32, truncated, mode)}


def asked(limit: int | None = RECEIVED, **values: Any) -> ResolvedCase:
    """A case of two ranks that each receive 20 rows."""
    case: Case = tiny_case(2, tokens=TOKENS, **{"numerics": "exact", "policy": "unchecked"} | values)
    return ResolvedCase(case, Traffic(case.tokens, (RECEIVED, RECEIVED), case.capacity), limit)


def seen(rank: int, resolved: ResolvedCase, **values: Any) -> Observation:
    """Record of a rank in a clean case."""
    exact = resolved.case.numerics == "exact"
    arms = (*ARMS, ORACLE) if exact else ARMS
    known: dict[str, Any] = {
        "rank": rank,
        "host": "host",
        "device": "cpu",
        "tokens": TOKENS,
        "total_recv": RECEIVED,
        "capacity": CAPACITY,
        "limit": resolved.limit,
        "lost": LostRows(),
        "kernels": kernels(),
        "digests": dict.fromkeys(arms, "0"),
        "divergences": [],
        "comparisons": dict.fromkeys(map(pair_name, pairs_of(arms)), NO_DIFFERENCE),
        "reference": None,
        "distance": {} if exact else dict.fromkeys(ARMS, 0.0),
        "token_counts": TokenCounts(),
        "injected": {},
        "nan_tokens": dict.fromkeys(arms, 0),
        "durations_us": {},
        "transport": {},
        "peak_bytes": 0,
        "packages": {},
    }
    return Observation(**known | values)


def gathered(resolved: ResolvedCase, *ranks: dict[str, Any], differing: dict[str, Any] | None = None) -> Gathered:
    """Gathered records: changes of each rank, two at least, against a clean case, and differing pairs by name."""
    records = [seen(rank, resolved, **values) for rank, values in enumerate((*ranks, {}, {})[: max(len(ranks), 2)])]
    comparisons: dict[str, RowComparison] = dict(records[0].comparisons)
    listed: dict[str, list[tuple[int, int]]] = {pair: [] for pair in comparisons}
    for pair, found in (differing or {}).items():
        comparisons[pair], listed[pair] = found, [(1, 3)]
    return Gathered(records, comparisons, listed, [], "rows", 0)


def divergence(arm: str, stage: str = "experts", against: str = ORACLE, **values: Any) -> Divergence:
    """A divergence of a stage on rank 1 in four rows."""
    known: dict[str, Any] = {"stage": stage, "arm": arm, "rank": 1, "field": "rows", "against": against, "rows": 4}
    return Divergence(**known | values)


def lost_as_asked(arm: str, resolved: ResolvedCase, rank: int = 1, more: int = 0) -> Divergence:
    """A divergence in the rows past the limit and in `more` further rows."""
    rows = RECEIVED - (resolved.limit or 0) + more
    return divergence(arm, "truncate", "received", rank=rank, rows=rows)


def arm_error(arm: str, *, within: bool, stage: str = "combine", ratio: float | None = 1.0) -> ArmError:
    """The error of an arm on one rank."""
    return ArmError(
        arm=arm,
        stage=stage,
        family="bf16 rows, float32 sum",
        rows=64,
        nan_rows=0 if ratio is not None else 1,
        ratio=ratio,
        bias=None if ratio is None else 0.5,
        worst=None if ratio is None else 0.004,
        ideal_worst=0.004,
        allowed={"ratio_low": 0.9, "ratio_high": 1.1, "bias": 5.0, "worst": 0.01},
        within=within,
    )


def changed(found: Gathered, **values: Any) -> Gathered:
    """`gathered` with other values."""
    return msgspec.structs.replace(found, **values)
