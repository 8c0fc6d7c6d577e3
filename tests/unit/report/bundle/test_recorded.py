"""Facts that are read from a bundle's record."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.report.bundle.recorded import recorded_order
from distbench.transport.sum_order import SumOrder


@pytest.mark.parametrize(
    ("facts", "order"),
    [
        ({"kernel": "shared_memory", "rows": "torch", "row_bytes": 96}, SumOrder()),
        ({"kernel": "IntraNodeLL", "gpu_per_node": 8, "quant": "none"}, SumOrder(last_slot=True)),
        ({"kernel": "InterNodeV1", "gpu_per_node": 2, "quant": "none"}, SumOrder(node_ranks=2)),
        ({"kernel": "IntraNode", "gpu_per_node": 8, "quant": "fp8_blockwise"}, SumOrder(quantised=True)),
        ({"kernel": "InterNodeV1", "gpu_per_node": -1}, SumOrder()),
        ({"kernel": ["InterNodeV1"], "gpu_per_node": "2"}, SumOrder()),
        ({}, SumOrder()),
        ({"sum_order": {"last_slot": True, "node_ranks": 0, "quantised": False}}, SumOrder(last_slot=True)),
        ({"sum_order": {"by_rank": True}}, SumOrder(by_rank=True)),
        ({"sum_order": {"by_rank": "yes"}, "kernel": "IntraNodeLL"}, SumOrder(last_slot=True)),
    ],
)
def test_order_of_sums_is_that_of_the_recorded_transport(facts: dict[str, Any], order: SumOrder) -> None:
    assert recorded_order(facts) == order
