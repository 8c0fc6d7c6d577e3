"""A dispatch by a function: what a copy into the buffer would hide is refused, by the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distbench.errors import BrokenContract
from distbench.pipeline.in_group import FunctionTransport
from distbench.pipeline.inputs import workload_for
from distbench.plugins import Dispatched, TokenBatch, TransportContext
from tests.cases import tiny_case


def dispatched(batch: TokenBatch) -> Dispatched:
    return Dispatched(*batch, torch.tensor([len(batch.ids)], dtype=torch.int32))


def transport(**changes: Any) -> tuple[FunctionTransport, TokenBatch]:
    """A transport for one rank, whose function returns its batch with `changes`; and the batch."""
    case = tiny_case(1, tokens=(3,))
    like = workload_for(case, torch.device("cpu")).tokens(0)
    context = TransportContext(case, None, 0, torch.device("cpu"), None, torch.tensor([[3]]), like, None)  # type: ignore[arg-type]
    changed = {name: change(getattr(dispatched(like), name)) for name, change in changes.items()}
    return FunctionTransport(context, lambda batch: dispatched(batch)._replace(**changed), lambda rows, _: rows), like


def test_rows_of_a_function_are_copied_into_the_buffer_of_the_case() -> None:
    made, like = transport()
    found = made.dispatch(like)
    assert len(found.hidden) == made.capacity
    assert torch.equal(found.hidden[:3], like.hidden)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden": lambda one: one.float()}, "dispatch.dtype: hidden: float32 instead of bfloat16"),
        ({"ids": lambda one: one.long()}, "dispatch.dtype: ids: int64 instead of int32"),
        ({"weights": lambda one: one[:, :1]}, "dispatch.shape: weights: "),
        ({"weights": lambda one: one[:1]}, "dispatch.shape: weights: "),
        ({"ids": lambda one: one.to("meta")}, "dispatch.device: ids: meta instead of cpu"),
        ({"weights": list}, "dispatch.type: weights"),
        ({"scales": lambda _: torch.ones(3, 2)}, "dispatch.type: scales is a Tensor"),
        ({"total_recv": lambda one: one - 4}, "dispatch.shape: -1 rows received in a buffer of 3"),
    ],
)
def test_rows_that_a_copy_would_convert_are_refused(changes: dict[str, Any], told: str) -> None:
    made, like = transport(**changes)
    with pytest.raises(BrokenContract, match=f"^dispatch breaks {told}"):
        made.dispatch(like)
