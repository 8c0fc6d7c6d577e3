"""The plan of a rank's symmetric memory, and the ranks that cannot map it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distbench.case.timeouts import patience
from distbench.errors import Unsupported
from distbench.transport.symmetric import memory
from distbench.transport.symmetric.plan import CONTROL_WORDS, MOST_RANKS, Plan, plan_memory
from distbench.workload.batch import TokenBatch
from tests.cases import tiny_case


def batch(dtype: torch.dtype, columns: int, topk: int) -> TokenBatch:
    scales = torch.ones(1, 2) if dtype.itemsize == 1 else None
    hidden = torch.zeros(1, columns, dtype=dtype)
    return TokenBatch(hidden, scales, torch.ones(1, topk), torch.zeros(1, topk, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "columns", "topk"), [(1, 128, 1), (7, 256, 3), (513, 7168, 9)])
def test_regions_are_aligned_and_do_not_overlap(dtype: torch.dtype, rows: int, columns: int, topk: int) -> None:
    like = batch(dtype, columns, topk)
    plan = plan_memory(rows, like, 2)
    sizes = Plan(
        hidden=rows * columns * dtype.itemsize,
        scales=0 if like.scales is None else rows * 8,
        weights=rows * topk * 4,
        ids=rows * topk * 4,
        sources=rows * 4,
        returns=rows * columns * 2,
        size=0,
    )
    ends = sorted((start, start + size) for start, size in zip(plan[:-1], sizes[:-1], strict=True) if size)
    assert ends[0][0] == CONTROL_WORDS * 4
    assert all(start % 256 == 0 for start, _ in ends)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))
    assert ends[-1][1] <= plan.size
    assert (plan.scales == 0) == (like.scales is None)


def test_control_words_hold_both_arrivals_of_the_most_ranks() -> None:
    assert 32 + 2 * MOST_RANKS <= CONTROL_WORDS


def session(ranks: int, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    monkeypatch.setattr(dist, "get_world_size", lambda _: ranks)
    known = {"group": None, "local_ranks": ranks, "device": torch.device("cuda", 0), "shared": object()}
    return SimpleNamespace(**known | values)


@pytest.mark.parametrize(
    ("ranks", "values", "told"),
    [
        (64, {}, "64 ranks, the kernels take up to 32"),
        (4, {"local_ranks": 2}, "4 ranks on several hosts, 2 on this one"),
        (
            2,
            {"device": torch.device("cpu")},
            "its kernels on GPUs; set TRITON_INTERPRET=1",
        ),
    ],
)
def test_ranks_that_cannot_map_each_others_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch, ranks: int, values: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda _: object())
    with pytest.raises(Unsupported, match=told):
        memory.check_mappable(session(ranks, monkeypatch, **values), [0] * ranks)


def test_missing_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda _: None)
    with pytest.raises(Unsupported, match="Triton is not installed"):
        memory.check_mappable(session(2, monkeypatch), [0, 1])


def test_device_without_peer_access_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _, other: other != 2)
    with pytest.raises(Unsupported, match="device 0 cannot map the memory of device 2"):
        memory.check_mappable(session(3, monkeypatch), [0, 1, 2])
    memory.check_mappable(session(3, monkeypatch), [0, 1, 0])  # of its own device


def test_interpreted_ranks_without_shared_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda _: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Unsupported, match="the ranks share no memory on this host"):
        memory.check_mappable(session(2, monkeypatch, device=torch.device("cpu"), shared=None), [-1, -1])


def test_kernel_waits_as_long_as_its_stage_may_take_or_any_stage_of_the_layer() -> None:
    assert patience(tiny_case(2, stage_timeouts="dispatch=3"), "dispatch") == 3
    assert patience(tiny_case(2, timeout=7.0, stage_timeouts="experts=60"), "combine") == 60
