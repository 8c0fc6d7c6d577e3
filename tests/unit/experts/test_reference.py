"""The reference experts: grouping of routes, and rows of an earlier call."""

from __future__ import annotations

import torch

from distbench.experts import make_experts
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.reference import grouped_routes, local_experts, local_rows
from distbench.pipeline.inputs import workload_for
from tests.cases import tiny_case


def test_routes_are_grouped_by_local_expert_in_row_order() -> None:
    ids = torch.tensor([[5, 2], [-1, 4], [2, 0x7FFF_0000], [6, 7], [2, 3]], dtype=torch.int32)
    mask = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0], dtype=torch.int32)
    local = local_experts(ids, local_rows(mask)).flatten()
    assert local.tolist() == [2, 0, -1, 1, 0, -1, -1, -1, 0, -1]
    whole, *_ = grouped_routes(local, 3, 1)
    assert whole.experts.tolist() == [0, 1, 2]
    assert whole.routes.tolist() == [[1, 4, 8, 10], [3, 10, 10, 10], [0, 10, 10, 10]]
    parts = list(grouped_routes(local, 3, 8 << 20))
    assert [part.experts.tolist() for part in parts] == [[0], [1], [2]]
    assert [part.routes.tolist() for part in parts] == [[[1, 4, 8, 10]], [[3, 10, 10, 10]], [[0, 10, 10, 10]]]
    assert [part.run for part in (whole, *parts)] == [slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3)]
    apart, *_ = grouped_routes(torch.tensor([2, 0, 2]), 3, 1)
    assert (apart.experts.tolist(), apart.run) == ([0, 2], None)
    assert list(grouped_routes(torch.full((4,), -1), 3, 1)) == []


def test_rows_that_a_call_does_not_write_are_nan_whatever_the_call_before_wrote() -> None:
    case = tiny_case(1, tokens=(9,))
    workload = workload_for(case, torch.device("cpu"))
    batch, mask = workload.tokens(0), torch.ones(case.num_experts, dtype=torch.int32)
    weights, experts = ExpertWeights(*workload.local_weights(0), mask), make_experts(case)
    with torch.inference_mode():
        for live in (3, 9, 5, 0, 7):
            count = torch.tensor([live], dtype=torch.int32)
            made = experts(ExpertInput(batch.hidden, None, batch.weights, batch.ids, count), weights)
            assert made.isnan().all(1).tolist() == [row >= live for row in range(9)]
