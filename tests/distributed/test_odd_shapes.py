"""Shapes with unaligned rows: contiguous() does not copy a single row of odd width, so it stays unaligned."""

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

ODD: dict[str, Any] = {"hidden_size": 9, "intermediate_size": 8, "topk": 1, "tokens": 1}
PARTS: list[dict[str, Any]] = [
    *(
        {"transport": "mori", "emulate": True, "mori_kernel": kernel}
        for kernel in ("IntraNode", "IntraNodeLL", "AsyncLL")
    ),
    {"transport": "mori", "emulate": True, "combine_input": "registered"},
    {"transport": "mori", "emulate": True, "combine_quant": "fp8_direct_cast"},
    {"transport": "mori", "emulate": True, "mori_kernel": "AsyncLL", "combine_quant": "fp8_blockwise"},
    {"experts": "aiter", "emulate": True},
    {},
]


def endings(session: Session, cases: list[Case]) -> list[tuple[Verdict, str]]:
    found: list[tuple[Verdict, str]] = []
    for case in cases:
        session.enter(case.ep_size)
        outcome = run_case(session, case)
        if outcome is not None:
            reasons = outcome.judgement.reasons
            found.append((outcome.judgement.verdict, reasons[0].message if reasons else ""))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
def test_cases_with_single_rows_of_odd_width_pass(ranks: int, numerics: str) -> None:
    shapes = [ODD, ODD | {"hidden_size": 11, "intermediate_size": 3}, ODD | {"tokens": 2, "hidden_size": 17}]
    cases = [
        tiny_case(ranks, num_experts=ranks, numerics=numerics, require="tolerance", **shape, **parts)
        for shape, parts in product(shapes, PARTS)
    ]
    allowed = (Verdict.PASS, Verdict.INVALID, Verdict.UNSUPPORTED)
    found = on_ranks(ranks, endings, cases)[0]
    assert [one for one in found if one[0] not in allowed] == []
    assert sum(one[0] is Verdict.PASS for one in found) > len(cases) // 2
