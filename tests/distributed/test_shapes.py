"""Layers with shared and replicated experts and ids of -1, on ranks: transports, experts, both kinds of inputs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import Verdict
from distbench.pipeline.run_case import run_case
from tests.cases import tiny_case
from tests.ranks import on_ranks

SHAPES: list[dict[str, Any]] = [
    {"shared_experts": 1},
    {"shared_experts": 2, "dispatch_dtype": "fp8"},
    {"num_experts": 3, "topk": 2, "placement": (0, 1, 2, 0, 1, 1, 2, 0), "shared_experts": 1},
    {"num_experts": 6, "topk": 3, "physical_experts": 12, "replica_choice": "static", "dispatch_dtype": "fp8"},
]
DROPPED: list[dict[str, Any]] = [
    {"dropped_slots": 0.3, "dropped_tokens": 0.3},
    {
        "dropped_slots": 0.3,
        "dropped_tokens": 0.1,
        "shared_experts": 1,
        "num_experts": 3,
        "physical_experts": 8,
        "topk": 2,
    },
]
PARTS: list[dict[str, Any]] = [
    {"transport": "mori", "emulate": True, "cu_count": 256},
    {"transport": "mori", "emulate": True, "cu_count": 256, "mori_kernel": "InterNodeV1", "gpu_per_node": 2},
    {"two_batch_overlap": True, "limit": "off"},
]
AITER = {"experts": "aiter", "emulate": True, "cu_count": 256}


def endings(session: Session, cases: list[Case]) -> list[tuple[Verdict, str]]:
    found: list[tuple[Verdict, str]] = []
    for case in cases:
        outcome = run_case(session, case)
        if outcome is not None:
            reasons = outcome.judgement.reasons
            found.append((outcome.judgement.verdict, reasons[0].message if reasons else ""))
    return found


def cases_of(shapes: list[dict[str, Any]], parts: list[dict[str, Any]], **keys: Any) -> list[Case]:
    common = {"tokens": (9, 0, 14, 3), "numerics": "both"} | keys
    return [tiny_case(4, **(common | shape | part)) for shape, part in product(shapes, parts)]


def test_layers_with_shared_replicated_and_dropped_slots_pass_with_all_transports_and_experts() -> None:
    cases = cases_of([*SHAPES, *DROPPED], [{}])
    cases += cases_of([SHAPES[2], DROPPED[1]], PARTS, numerics="exact")
    cases += cases_of(SHAPES[1:3], [AITER, AITER | {"transport": "mori"}], numerics="exact")
    found = on_ranks(4, endings, cases)[0]
    assert [one for one in found if one[0] is not Verdict.PASS] == []


def test_cut_that_is_a_row_short_is_under_the_limit_and_the_proven_one_is_not() -> None:
    short = cases_of([*SHAPES[2:], *DROPPED[1:]], [{}], limit="max-recv-1", policy="unchecked", numerics="exact")
    proven = cases_of(
        [*SHAPES, *DROPPED], [{}], limit="sum", policy="unchecked", numerics="exact", routing="hot-rank:2"
    )
    found = [verdict for verdict, _ in on_ranks(4, endings, [*short, *proven])[0]]
    assert found == [Verdict.UNDER_LIMIT] * len(short) + [Verdict.PASS] * len(proven)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (AITER, "aiter's sorter reads expert_mask at each id"),
        ({"transport": "mori", "emulate": True, "cu_count": 256, "mori_kernel": "AsyncLL"}, "AsyncLL of MoRI sends"),
    ],
)
def test_ids_of_minus_one_are_unsupported_where_a_package_reads_out_of_bounds(parts: dict[str, Any], told: str) -> None:
    for verdict, message in on_ranks(4, endings, cases_of(DROPPED, [parts]))[0]:
        assert verdict is Verdict.UNSUPPORTED
        assert told in message


FAULTS: dict[str, dict[str, Any]] = {
    "shared-counted-twice": {"shared_experts": 1},
    "replica-summed-twice": {"num_experts": 16, "physical_experts": 32, "shared_experts": 1},
    "mask-all-ones": {"dropped_slots": 0.2},
}


def findings(session: Session, cases: list[Case]) -> list[list[tuple[str, str | None, int | None]]]:
    outcomes = [run_case(session, case) for case in cases]
    return [
        [(one.judgement.verdict.value, reason.stage, reason.rank) for reason in one.judgement.reasons[:1]]
        for one in outcomes
        if one is not None
    ]


def test_slot_counted_twice_and_mask_of_ones_are_found_at_the_experts_of_their_rank() -> None:
    cases = [
        tiny_case(4, tokens=12, numerics="exact", inject=f"{name}:rank=2,arm=truncated", limit="sum", **keys)
        for name, keys in FAULTS.items()
    ]
    assert on_ranks(4, findings, cases)[0] == [[("CORRUPT", "experts", 2)]] * len(FAULTS)
