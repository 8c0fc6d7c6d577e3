"""Checks of single stages by table: the tensors of a pass on one rank, and the findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from distbench.case.stages import Arm
from distbench.experts.base import ExpertInput
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.truncation import padded, truncated
from distbench.transport.base import Dispatched, poison_
from distbench.verify.records import FINITE, ORACLE, Divergence
from distbench.verify.stage_check import StageChecker, counts_of
from tests.cases import tiny_case

TOKENS, CAPACITY = 6, 16
CPU = torch.device("cpu")


class Scene(NamedTuple):
    """One rank that holds all experts: its received rows, in its own order, and their expert rows."""

    checker: StageChecker
    sources: Tensor
    dispatched: Dispatched
    rows: Tensor

    def told(self, arm: str = "padded", cut: Callable[[Dispatched], ExpertInput] = padded) -> list[Divergence]:
        given = cut(self.dispatched)
        counts = counts_of(self.dispatched, given, self.checker.looks)
        return self.checker.check_rows(arm, self.sources, counts, self.dispatched, given, self.rows)


def scene(numerics: str = "exact", dtype: str = "bf16") -> Scene:
    case = tiny_case(1, tokens=TOKENS, max_dispatch_tokens_per_rank=CAPACITY, numerics=numerics, dispatch_dtype=dtype)
    workload = workload_for(case, CPU)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    batch = workload.tokens(0, order)
    made = workload.expected_rows(0, batch)
    rows = made if made is not None else torch.randn(TOKENS, 256, generator=torch.Generator().manual_seed(1)).bfloat16()

    def buffer(part: Tensor) -> Tensor:
        whole = part.new_empty(CAPACITY, part.shape[1])
        poison_(whole)
        whole.view(torch.uint8)[:TOKENS] = part.view(torch.uint8)
        return whole

    dispatched = Dispatched(
        hidden=buffer(batch.hidden),
        scales=None if batch.scales is None else buffer(batch.scales),
        weights=buffer(batch.weights),
        ids=buffer(batch.ids),
        total_recv=torch.tensor([TOKENS], dtype=torch.int32),
    )
    sources = torch.stack([torch.zeros_like(order), order], dim=1)
    checker = StageChecker(workload, 0, torch.tensor([[TOKENS]]), CAPACITY)
    return Scene(checker, sources, dispatched, buffer(rows))


def flip(rows: Tensor, row: int = 2, byte: int = 1) -> None:
    rows.view(torch.uint8)[row, byte] ^= 1


@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_correct_pass_has_no_finding(numerics: str, dtype: str) -> None:
    found = scene(numerics, dtype)
    assert found.told() == []
    assert found.told("truncated", lambda dispatched: truncated(dispatched, TOKENS)) == []


@pytest.mark.parametrize("field", ["hidden", "scales", "weights", "ids"])
def test_bit_flip_in_a_received_field_is_a_finding_of_dispatch(field: str) -> None:
    found = scene(dtype="fp8")
    flip(getattr(found.dispatched, field), byte=0)
    (told,) = found.told()
    assert (told.stage, told.field, told.rows, told.source_token, told.row) == ("dispatch", field, 1, 5, 2)
    assert told.evidence.fields == [field]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda found: found.dispatched.total_recv.sub_(1), "total_recv"),
        (lambda found: found.sources[:, 0].add_(1), "sources"),
        (lambda found: found.sources[0].copy_(found.sources[1]), "sources"),
        (lambda found: found.sources[0, 1].fill_(TOKENS), "sources"),
        (lambda found: found.sources[0, 1].fill_(-1), "sources"),
    ],
)
def test_received_rows_that_differ_from_the_agreed_batch_are_a_finding_of_dispatch(
    change: Callable[[Scene], object], field: str
) -> None:
    found = scene()
    change(found)
    assert (found.told()[0].stage, found.told()[0].field) == ("dispatch", field)


def test_bit_flip_in_an_expert_row_is_a_finding_of_experts() -> None:
    found = scene()
    flip(found.rows)
    (told,) = found.told()
    assert (told.stage, told.against, told.rows, told.source_token) == ("experts", ORACLE, 1, 5)
    assert told.proven


def test_expert_row_with_a_wrong_input_is_no_finding_of_experts() -> None:
    found = scene()
    flip(found.dispatched.hidden)
    flip(found.rows)
    assert [told.stage for told in found.told()] == ["dispatch"]


def test_damage_in_truncation_is_no_finding_of_dispatch() -> None:
    found = scene()

    def damaged(dispatched: Dispatched) -> ExpertInput:
        given = truncated(dispatched, TOKENS)._replace(hidden=dispatched.hidden[:TOKENS].clone())
        flip(given.hidden)
        return given

    assert [(told.stage, told.field) for told in found.told("truncated", damaged)] == [("truncate", "hidden")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_padded_row_is_proven_wrong_and_excluded_as_baseline(value: float) -> None:
    found = scene("gaussian")
    found.rows[2, 7] = value
    (told,) = found.told()
    assert (told.arm, told.stage, told.against, told.rows, told.proven) == ("padded", "experts", FINITE, 1, True)
    found.rows[2, 7] = 1.0
    assert found.told("control") == []


@pytest.mark.parametrize(
    ("share", "far"), [(2.0**-8, 0), (2.0**-6, 0), (2.0**-4, 1), (1.0, 1), (float("nan"), 1), (float("inf"), 1)]
)
def test_rows_that_differ_from_padded_are_near_or_far_by_the_tolerance(share: float, far: int) -> None:
    found = scene("gaussian")
    assert found.told() == []
    before = found.rows[2].clone()
    place = int(before.abs().argmin())
    found.rows[2, place] += share * float(before.abs().amax())
    (told,) = found.told("truncated")
    assert (told.stage, told.against, told.rows, told.far, told.proven) == ("experts", Arm.PADDED, 1, far, False)


def cut_of(dispatched: Dispatched, rows: int, **uncut: Any) -> ExpertInput:
    return truncated(dispatched, rows)._replace(**uncut)


@pytest.mark.parametrize("field", ["scales", "weights", "ids"])
def test_single_tensor_that_is_not_truncated_is_found(field: str) -> None:
    found = scene(dtype="fp8")
    given = cut_of(found.dispatched, TOKENS, **{field: getattr(found.dispatched, field)})
    told = found.checker.check_cut(
        "truncated", found.sources, counts_of(found.dispatched, given, found.checker.looks), given, TOKENS
    )
    assert told is not None
    assert (told.stage, told.field, told.proven) == ("truncate", "tensors", True)


def test_hidden_rows_that_are_not_truncated_are_found_by_row_count() -> None:
    found = scene()
    given = cut_of(found.dispatched, TOKENS, hidden=found.dispatched.hidden)
    told = found.checker.check_cut(
        "truncated", found.sources, counts_of(found.dispatched, given, found.checker.looks), given, TOKENS
    )
    assert told is not None
    assert told.field == "row count"


@pytest.mark.parametrize(
    ("kept", "live", "wanted", "field", "rows"),
    [
        (TOKENS, TOKENS, TOKENS, "", 0),
        (TOKENS - 1, TOKENS, TOKENS - 1, "rows", 1),
        (TOKENS, TOKENS - 2, TOKENS, "rows", 2),
        (TOKENS + 1, TOKENS, TOKENS, "row count", 1),
        (TOKENS + 2, TOKENS + 2, TOKENS + 2, "num_local_tokens", 1),
    ],
)
def test_truncation_is_checked_against_its_limit(kept: int, live: int, wanted: int, field: str, rows: int) -> None:
    found = scene()
    given = cut_of(found.dispatched, kept, num_local_tokens=torch.tensor([live], dtype=torch.int32))
    told = found.checker.check_cut(
        "truncated", found.sources, counts_of(found.dispatched, given, found.checker.looks), given, wanted
    )
    assert (told.field if told else "", told.rows if told else 0) == (field, rows)


def looked_at(found: Scene) -> ExpertInput:
    """The experts' input, after both looks."""
    given = padded(found.dispatched)
    found.checker.looks.arrived(found.dispatched)
    found.checker.looks.given(given)
    return given


@pytest.mark.parametrize("field", ["hidden", "scales", "weights", "ids"])
def test_input_that_the_experts_overwrite_is_a_finding_of_the_experts(field: str) -> None:
    found = scene(dtype="fp8")
    looked_at(found)
    flip(getattr(found.dispatched, field), byte=0)
    (told,) = found.told()
    assert (told.stage, told.field, told.rows, told.source_token) == ("experts", field, 1, 5)
    assert told.evidence.pattern == f"{field} overwritten by the experts"


def test_words_of_a_row_that_change_so_that_their_sum_stays_are_a_change() -> None:
    found = scene()
    looked_at(found)
    words = found.dispatched.hidden.view(torch.int64)[2]
    words[0] += 1
    words[1] -= 1
    (told,) = found.told()
    assert told.stage == "experts"


def test_buffer_that_the_cut_overwrites_is_a_finding_of_the_cut() -> None:
    found = scene()
    found.checker.looks.arrived(found.dispatched)
    flip(found.dispatched.weights)
    found.checker.looks.given(padded(found.dispatched))
    (told,) = found.told()
    assert (told.stage, told.field, told.rows) == ("truncate", "weights", 1)


def test_row_that_was_wrong_before_the_experts_is_a_finding_of_dispatch() -> None:
    found = scene()
    flip(found.dispatched.hidden)
    looked_at(found)
    flip(found.dispatched.hidden, row=3)
    told = found.told()
    assert [(one.stage, one.rows, one.row) for one in told] == [("dispatch", 1, 2), ("experts", 1, 3)]


def test_row_that_comes_after_the_experts_is_a_finding_of_dispatch_alone() -> None:
    found = scene()
    flip(found.dispatched.hidden)
    looked_at(found)
    flip(found.dispatched.hidden)
    flip(found.rows)
    (told,) = found.told()
    assert (told.stage, told.field, told.rows, told.row) == ("dispatch", "received rows", 1, 2)
    assert told.evidence.pattern == "rows that came late"


def test_looks_of_another_pass_blame_nobody() -> None:
    found = scene()
    looked_at(found)
    found.checker.looks.begin()
    flip(found.dispatched.hidden)
    (told,) = found.told()
    assert told.stage == "dispatch"


def test_live_count_that_the_experts_overwrite_is_theirs_alone() -> None:
    found = scene()
    given = looked_at(found)
    given.num_local_tokens.zero_()
    (told,) = found.told()
    assert (told.stage, told.field) == ("experts", "num_local_tokens")
