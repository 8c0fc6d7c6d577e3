"""Each case has weights and a mask of its own: what experts write to them by mistake spoils no later case."""

from __future__ import annotations

import torch

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.run_case import _weights
from tests.cases import tiny_case


class _Rank:
    """A session's rank and device."""

    rank, device = 1, torch.device("cpu")


def _given(case: Case) -> list[torch.Tensor]:
    session: Session = _Rank()  # type: ignore[assignment]
    weights = _weights(session, case, workload_for(case, session.device))
    return [weights.w1, weights.w2, weights.mask]


def test_experts_that_write_to_weights_and_mask_spoil_no_later_case() -> None:
    case = tiny_case(2, numerics="exact")
    right = [one.clone() for one in _given(case)]
    for one in _given(case):
        one.zero_()
    for again, first in zip(_given(case), right, strict=True):
        assert torch.equal(again, first)
    assert right[2].tolist() == [0] * 4 + [1] * 4
