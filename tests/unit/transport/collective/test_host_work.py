"""A dispatch and a combine on a device cost the host five launches, one allocation and the exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from distbench.workload.batch import TokenBatch
from tests.unit.transport.collective.host_work import KERNELS, Scene, measure, scene

_OUTPUT = 3 + 4  # of a launch of add_rows: the grid, and the arguments before `out`


def launches_of_a_call(one: Scene) -> list[tuple[str, list[Any]]]:
    """Launches of a dispatch and a combine, without the address of the output, which is new in each."""
    one.launched.clear()
    one.call()
    return [
        (name, [*arguments[:_OUTPUT], *arguments[_OUTPUT + 1 :]] if name == "add_rows" else arguments)
        for name, arguments in one.launched
    ]


def test_known_routing_costs_five_launches_and_one_allocation() -> None:
    found = measure(0)
    assert found["dispatch"] == {"operations": [], "launches": ["move"] * 3, "us": None}
    assert found["combine"] == {"operations": ["aten.new_empty.default"], "launches": [*KERNELS[1:]], "us": None}


def test_repeated_launches_have_the_arguments_of_the_first() -> None:
    with scene(shuffled=False) as one:
        one.mover._recorded.clear()  # noqa: SLF001 - the next call records
        first = launches_of_a_call(one)
        assert len(one.mover._recorded) == len(first) == 5  # noqa: SLF001 - the next call repeats
        assert launches_of_a_call(one) == first


def test_repeated_launches_take_the_addresses_of_the_next_tensors() -> None:
    with scene() as one:
        hidden, scales, weights, ids = one.batch
        one.batch = TokenBatch(hidden.clone(), scales, weights.clone(), ids)
        one.expert_out = one.expert_out.clone()
        leave, stay, _, take_back, add = launches_of_a_call(one)
        moved = [one.batch.hidden.data_ptr(), one.batch.weights.data_ptr()]
        assert [leave[1][3], leave[1][5]] == [stay[1][3], stay[1][5]] == moved
        assert take_back[1][3] == add[1][4] == one.expert_out.data_ptr()


def test_unaligned_tensors_are_launched_by_triton_with_their_own_addresses() -> None:
    with scene() as one:
        weights = one.batch.weights
        unaligned = weights.new_empty(weights.numel() + 2)[2:].view(weights.shape)
        one.batch = one.batch._replace(weights=unaligned)
        recorded = dict(one.mover._recorded)  # noqa: SLF001 - no recording is made, or replaced
        one.call()  # compiles
        leave, stay, *_ = launches_of_a_call(one)
        assert unaligned.data_ptr() % 16 == 8
        assert (leave[1][5], stay[1][5]) == (unaligned.data_ptr(),) * 2
        assert one.mover._recorded == recorded  # noqa: SLF001 - as above


def test_batch_that_is_not_contiguous_is_copied_in_each_call() -> None:
    with scene() as one:
        wide = torch.randn(one.batch.hidden.shape[0], 2 * one.batch.hidden.shape[1]).bfloat16()
        one.batch = one.batch._replace(hidden=wide[:, ::2])
        for value in (1.0, 2.0):
            wide.fill_(value)
            one.call()
            sent = one.transport._fields[0].view(torch.bfloat16)
            assert bool((sent == value).all())
