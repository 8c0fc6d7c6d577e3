"""The form of a mutant: a small patch at a named seam of the layer, and the corpus's facts about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.experts.base import ExpertInput
from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group

Touched = Literal["all", "row", "elements"]

BOUNDARIES = {
    "sent": Stage.DISPATCH,
    "received": Stage.DISPATCH,
    "cut": Stage.TRUNCATE,
    "asked": Stage.EXPERTS,
    "computed": Stage.EXPERTS,
    "returned": Stage.COMBINE,
    "combined": Stage.COMBINE,
}
"""Seams around any transport, cut and experts, by the methods of `Fault`, and the stage of each."""

STEPS = ("widen", "first", "bias", "activate", "store", "requantise", "second", "weigh", "round", "add")
"""Seams inside the reference experts: the methods of `distbench.experts.steps.Steps`."""

SUM = "sum"
"""The seam inside the collective transport: the sum of one token's rows."""

SETTINGS = ("bf16", "fp8", "cast", "blockwise", "gelu", "limit", "weights first", "bias fp8", "gpt-oss")
"""Settings of trials: dispatch in bf16, in fp8; combine with fp8_direct_cast, fp8_blockwise and top-k 8; arguments.

With gpt-oss, activation swiglu, biases and padding of both sizes.
"""

SPARSE = 64
"""A mutant of single rows touches at most one in this number of rows."""

RARE_ROW = 37


class Site(NamedTuple):
    """Surroundings of a patch: `right` is the step that it replaces, `kept` holds values between seams."""

    case: Case
    rank: int
    right: Callable[..., Tensor]
    kept: dict[str, Tensor]

    @property
    def first_expert(self) -> int:
        """The global id of the rank's first expert."""
        return self.rank * self.case.experts_per_rank

    def local(self, ids: Tensor) -> Tensor:
        """Return a mask of the global ids that are experts of this rank, bool like ids."""
        return (ids >= self.first_expert) & (ids < self.first_expert + self.case.experts_per_rank)

    def rows_of(self, group: Group) -> Tensor:
        """Return the row of each route of a group, int64 [g, m]; -1 past an expert's last route."""
        rows = group.routes.div(self.case.topk_slots, rounding_mode="floor")
        return torch.where(group.routes < group.total, rows, -1)

    def rare_in(self, group: Group) -> Tensor:
        """Return a mask of a group's routes that belong to rare rows: bool [g, m, 1]."""
        return (self.rows_of(group) % SPARSE == RARE_ROW).unsqueeze(2)


def rare(count: int) -> Tensor:
    """Return the touched ones of `count` rows where at most one in 64 is: int64 [.]."""
    return torch.arange(min(RARE_ROW, max(count - 1, 0)), count, SPARSE)


def earlier(rows: Tensor) -> Tensor:
    """Return rows as an earlier batch may have left them: the same rows, of other tokens."""
    return rows.roll(max(len(rows) // 2, 1), 0)


def live(given: ExpertInput) -> int:
    """Return the number of live rows in the experts' input."""
    return min(int(given.num_local_tokens), given.rows)


def by_next_expert(site: Site, rows: Tensor, weights: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Return a step's product of each expert's rows [g, m, K] with the weights of the next expert in the group."""
    return site.right(rows.roll(1, 0), weights, group, choice).roll(-1, 0)


Patch = Callable[..., Any]


class Mutant(NamedTuple):
    """One entry of the corpus.

    `patches` are functions by seam: `patch(site, *arguments of the step)` replaces a step, `patch(site, *values passed
    there)` changes a boundary. `touches` says which part of the values at the seam it changes: all, at most one row in
    64, or at most 1 % of the elements. `settings` are those of its trials. `equivalent` proves in a sentence that the
    results are as good, so that it must not alarm; `unseen` says why some or all of its trials do not show it.
    """

    name: str
    kind: str
    patches: Mapping[str, Patch]
    text: str
    bug: str
    touches: Touched
    settings: tuple[str, ...]
    equivalent: str
    unseen: str

    @property
    def seams(self) -> tuple[str, ...]:
        """The seams that it patches; the first one names it."""
        return tuple(self.patches)

    @property
    def subtle(self) -> bool:
        """Whether it touches at most one row in 64, or 1 % of the elements."""
        return self.touches != "all"

    @property
    def anywhere(self) -> bool:
        """Whether it works with any kernel: it patches boundaries only."""
        return all(seam in BOUNDARIES for seam in self.patches)


class Class:
    """The mutants of one class, in the order of their definition."""

    def __init__(self, kind: str, *settings: str) -> None:
        """Start a class; `settings` are the default of its mutants' trials."""
        self.kind = kind
        self.mutants: list[Mutant] = []
        self._settings = settings or ("bf16",)

    def at(  # noqa: PLR0913 - the fields of a record
        self,
        seam: str,
        *settings: str,
        touches: Touched = "all",
        bug: str = "",
        equivalent: str = "",
        unseen: str = "",
        also: Mapping[str, Patch] | None = None,
    ) -> Callable[[Patch], Patch]:
        """Register a function as a mutant, named after the function and described by its docstring."""

        def add(patch: Patch) -> Patch:
            self.mutants.append(
                Mutant(
                    name=patch.__name__.replace("_", "-"),
                    kind=self.kind,
                    patches={seam: patch, **(also or {})},
                    text=(patch.__doc__ or "").strip().rstrip("."),
                    bug=bug,
                    touches=touches,
                    settings=settings or self._settings,
                    equivalent=equivalent,
                    unseen=unseen,
                )
            )
            return patch

        return add
