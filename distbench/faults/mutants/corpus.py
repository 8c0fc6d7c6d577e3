"""What a mutant is: a small patch at a named seam of the layer, and what the corpus says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distbench.case import Case
from distbench.experts.products import Weights
from distbench.experts.selection import KernelChoice
from distbench.experts.steps import Group
from distbench.truncation import ExpertInput

Touched = Literal["all", "row", "elements"]

BOUNDARIES = {
    "sent": "dispatch",
    "received": "dispatch",
    "cut": "truncate",
    "asked": "experts",
    "computed": "experts",
    "returned": "combine",
    "combined": "combine",
}
"""Seams around any transport, cut and experts, by the methods of `Fault`, and the stage that each belongs to."""

STEPS = ("widen", "first", "activate", "store", "requantise", "second", "weigh", "round", "add")
"""Seams inside the reference experts: the methods of `distbench.experts.steps.Steps`."""

SUM = "sum"
"""The seam inside the collective transport: how the rows of one token are added up."""

SETTINGS = ("bf16", "fp8", "cast", "blockwise")
"""What a mutant is tried with: dispatch in bf16, in fp8; combine with fp8_direct_cast, fp8_blockwise and top-k 8."""

SPARSE = 64
"""A mutant that touches single rows touches at most one in so many."""

RARE_ROW = 37


class Site(NamedTuple):
    """Where a patch finds itself: `right` is the step that it replaces, `kept` what it keeps from seam to seam."""

    case: Case
    rank: int
    right: Callable[..., Tensor]
    kept: dict[str, Tensor]

    @property
    def first_expert(self) -> int:
        """The global id of the rank's first expert."""
        return self.rank * self.case.experts_per_rank

    def local(self, ids: Tensor) -> Tensor:
        """Return which global ids are experts of this rank, bool like ids."""
        return (ids >= self.first_expert) & (ids < self.first_expert + self.case.experts_per_rank)

    def rows_of(self, group: Group) -> Tensor:
        """Return the row that each route of a group belongs to, int64 [g, m]; -1 past an expert's last one."""
        rows = group.routes.div(self.case.topk, rounding_mode="floor")
        return torch.where(group.routes < group.total, rows, -1)

    def rare_in(self, group: Group) -> Tensor:
        """Return which routes of a group are of the rare rows: bool [g, m, 1]."""
        return (self.rows_of(group) % SPARSE == RARE_ROW).unsqueeze(2)


def rare(count: int) -> Tensor:
    """Return which of `count` rows are touched where at most one in 64 is: int64 [.]."""
    return torch.arange(min(RARE_ROW, max(count - 1, 0)), count, SPARSE)


def earlier(rows: Tensor) -> Tensor:
    """Return what an earlier batch may have left in the place of rows: the same rows, for other tokens."""
    return rows.roll(max(len(rows) // 2, 1), 0)


def live(given: ExpertInput) -> int:
    """Return how many rows of the experts' input count."""
    return min(int(given.num_local_tokens), given.rows)


def by_next_expert(site: Site, rows: Tensor, weights: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Return a step's product of each expert's rows [g, m, K] with the weights of the next expert in the group."""
    return site.right(rows.roll(1, 0), weights, group, choice).roll(-1, 0)


Patch = Callable[..., Any]


class Mutant(NamedTuple):
    """One entry of the corpus.

    `patches` are functions by seam: of a step, `patch(site, *arguments of the step)` in its place; of a boundary,
    `patch(site, *what passes there)`. `touches` says what part of the values at the seam it changes: all, at most one
    row in 64, or at most 1 % of the elements. `settings` are those that it is tried with. `equivalent` proves in a
    sentence that the results are as good, so that it must not alarm; `unseen` says why some or all of its runs do not
    show it.
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
        """The seams that it patches, the one that it is named by first."""
        return tuple(self.patches)

    @property
    def subtle(self) -> bool:
        """Whether it touches at most one row in 64, or 1 % of the elements."""
        return self.touches != "all"

    @property
    def anywhere(self) -> bool:
        """Whether it can stand around any kernel: all that it patches are boundaries."""
        return all(seam in BOUNDARIES for seam in self.patches)


class Class:
    """The mutants of one class, in the order in which they are defined."""

    def __init__(self, kind: str, *settings: str) -> None:
        """`settings` are what its mutants are tried with unless one says otherwise."""
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
        """Take a function up as a mutant, named by the function's name and described by its docstring."""

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
