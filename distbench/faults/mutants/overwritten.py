"""Mutants that write where they may only read, and mutants that write too late."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distbench.experts.base import ExpertInput
from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group
from distbench.faults.mutants.corpus import Class, Site, live, rare
from distbench.transport.base import Dispatched

OVERWRITTEN = Class("overwritten")
_overwritten = OVERWRITTEN.at


@_overwritten("computed", "bf16", "fp8")
def input_overwritten(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The experts leave zeros where their hidden rows were."""
    given.hidden.view(torch.uint8)[: live(given)] = 0
    return rows


@_overwritten("computed")
def output_in_place_of_the_input(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The experts write their rows over those that they were given, as an operation in place does."""
    given.hidden[: live(given)] = rows[: live(given)]
    return rows


@_overwritten("computed")
def ids_made_local_in_place(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The experts turn global ids into local ones in the buffer that they were given."""
    given.ids[: live(given)] -= site.first_expert + 1
    return rows


@_overwritten("computed")
def live_count_overwritten(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The experts leave no live row."""
    given.num_local_tokens.zero_()
    return rows


@_overwritten("computed", touches="elements")
def one_routing_weight_overwritten(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The experts leave another weight in the first slot of one row in 64."""
    given.weights[rare(live(given)), 0] += 1
    return rows


@_overwritten("cut", touches="row")
def buffer_overwritten_by_the_cut(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The cut leaves zeros in one hidden row in 64 of the buffer that it takes a view of."""
    dispatched.hidden.view(torch.uint8)[rare(live(given))] = 0
    return given


@_overwritten("second", "bf16")
def weights_rounded_in_place(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 2 rounds its weights to 4 bits in the memory that holds them, as for a format of fewer bits."""
    w2._weights.view(torch.int16).bitwise_and_(-16)  # noqa: SLF001 - the tensor that the experts are given
    return site.right(rows, w2, group, choice)


@_overwritten("second", "bf16", touches="elements")
def one_weight_overwritten(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 2 leaves another first weight in the memory of the first expert."""
    made = site.right(rows, w2, group, choice)
    w2._weights[0, 0, 0] += 1  # noqa: SLF001 - as above
    return made


def _written_late(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    given.hidden.view(torch.uint8)[rare(live(given))] = site.kept["late"]
    return rows


@_overwritten(
    "received",
    "bf16",
    "fp8",
    touches="row",
    also={"computed": _written_late},
    bug="mori 522's class: a signal is visible before the stores that it stands for",
)
def one_row_arrives_late(site: Site, dispatched: Dispatched) -> Dispatched:
    """One received row in 64 is zero when dispatch returns, and there once the experts have read it."""
    whole = dispatched.hidden.view(torch.uint8)[: int(dispatched.total_recv)]
    site.kept["late"] = whole[rare(len(whole))]
    whole[rare(len(whole))] = 0
    return dispatched


@_overwritten(
    "returned",
    unseen="in truncated alone no call is before it that sent other tokens; where all arms have it, the next one does",
)
def ids_of_the_first_call(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Any]:
    """Combine adds by the ids of its first call."""
    return rows, site.kept.setdefault("ids", ids.clone())
