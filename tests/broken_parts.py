"""Deliberately broken transports and experts, twelve each, written against `distbench.plugins` alone.

Each is the option `bug` of one plugin, so that one launch runs many. On rank 1 alone, where a bug can be.
"""

from __future__ import annotations

import os
import time
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.plugins import (
    Dispatched,
    ExpertInput,
    ExpertsAround,
    ExpertsContext,
    ExpertWeights,
    KernelChoice,
    Plugin,
    TransportAround,
    TransportContext,
    collective_transport,
    reference_experts,
)

TransportBug = Literal[
    "swaps rows",
    "bends ids",
    "loses a weight",
    "counts less",
    "doubles",
    "shifts tokens",
    "moves buffers",
    "raises",
    "narrow tokens",
    "wide tokens",
    "stands",
    "dies",
]
ExpertsBug = Literal[
    "unweighted",
    "gate for up",
    "forgets an expert",
    "zeroes a row",
    "truncates",
    "other expert",
    "live rows only",
    "raises",
    "wide rows",
    "other rows",
    "stands",
    "dies",
]
_LONG_S = 600


class Bug(NamedTuple):
    """How a bug has to be named: the verdict, the rule or "", the stage, and the rank."""

    verdict: str
    rule: str
    stage: str
    rank: int = 1


NAMED: dict[tuple[str, str], Bug] = {
    ("transport", "swaps rows"): Bug("BASELINE_WRONG", "", "dispatch"),
    ("transport", "bends ids"): Bug("BASELINE_WRONG", "", "dispatch"),
    ("transport", "loses a weight"): Bug("BASELINE_WRONG", "", "dispatch"),
    ("transport", "counts less"): Bug("RANK_FAULT", "sources.shape", "check"),
    ("transport", "doubles"): Bug("BASELINE_WRONG", "", "combine"),
    ("transport", "shifts tokens"): Bug("BASELINE_WRONG", "", "combine"),
    ("transport", "moves buffers"): Bug("RANK_FAULT", "dispatch.stays", "dispatch"),
    ("transport", "raises"): Bug("RANK_FAULT", "dispatch.returns", "dispatch"),
    ("transport", "narrow tokens"): Bug("RANK_FAULT", "combine.shape", "combine"),
    ("transport", "wide tokens"): Bug("RANK_FAULT", "combine.dtype", "combine"),
    ("transport", "stands"): Bug("HANG", "combine.returns", "combine"),
    ("transport", "dies"): Bug("RANK_FAULT", "dispatch.returns", "dispatch"),
    ("experts", "unweighted"): Bug("BASELINE_WRONG", "", "experts"),
    ("experts", "gate for up"): Bug("BASELINE_WRONG", "", "experts"),
    ("experts", "forgets an expert"): Bug("BASELINE_WRONG", "", "experts"),
    ("experts", "zeroes a row"): Bug("BASELINE_WRONG", "", "experts"),
    ("experts", "truncates"): Bug("BASELINE_WRONG", "", "experts"),
    ("experts", "other expert"): Bug("BASELINE_WRONG", "", "experts"),
    ("experts", "live rows only"): Bug("RANK_FAULT", "experts.shape", "experts"),
    ("experts", "raises"): Bug("RANK_FAULT", "experts.returns", "experts"),
    ("experts", "wide rows"): Bug("RANK_FAULT", "experts.dtype", "experts"),
    ("experts", "other rows"): Bug("RANK_FAULT", "experts.selection", "check"),
    ("experts", "stands"): Bug("HANG", "experts.returns", "experts"),
    ("experts", "dies"): Bug("RANK_FAULT", "experts.returns", "experts"),
}


class TransportOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bug of a transport."""

    bug: TransportBug


class ExpertsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bug of experts."""

    bug: ExpertsBug


class BrokenTransport(TransportAround):
    """distbench's transport, with a bug on rank 1."""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))
        self._bug: Any = context.options.bug if context.rank == 1 else ""

    def dispatch_recv(self) -> Dispatched:
        found = super().dispatch_recv()
        if self._bug == "swaps rows":
            found.hidden[:2] = found.hidden[:2].flip(0)
        elif self._bug == "bends ids":
            found.ids[0] += 1
        elif self._bug == "loses a weight":
            found.weights[1, 0] = 0
        elif self._bug == "counts less":
            found.total_recv[0] -= 1
        elif self._bug == "moves buffers":
            return found._replace(weights=found.weights.clone())
        elif self._bug == "raises":
            raise OSError(self._bug)
        elif self._bug == "dies":
            os._exit(9)
        return found

    def combine_recv(self) -> Tensor:
        tokens = super().combine_recv()
        if self._bug == "doubles":
            return tokens * 2
        if self._bug == "shifts tokens":
            return tokens.roll(1, 0)
        if self._bug == "narrow tokens":
            return tokens[:, 1:]
        if self._bug == "wide tokens":
            return tokens.float()
        if self._bug == "stands":
            time.sleep(_LONG_S)
        return tokens


class BrokenExperts(ExpertsAround):
    """The reference experts, with a bug on the rank whose experts are the last ones."""

    def __init__(self, context: ExpertsContext) -> None:
        super().__init__(reference_experts(context))
        self._asked: Any = context.options.bug
        self._bug: Any = ""

    def selection(self, rows: int) -> KernelChoice:
        if self._bug == "other rows":
            return super().selection(rows + 1)
        return super().selection(rows)

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        self._bug = self._asked if int(weights.mask[-1]) else ""
        if self._bug == "raises":
            raise OSError(self._bug)
        if self._bug == "dies":
            os._exit(9)
        if self._bug == "stands":
            time.sleep(_LONG_S)
        rows = super().__call__(*self._damaged(given, weights))
        if self._bug == "live rows only":
            return rows[: int(given.num_local_tokens)]
        if self._bug == "wide rows":
            return rows.float()
        if self._bug == "zeroes a row":
            rows[1] = 0
        if self._bug == "truncates":
            return (rows.view(torch.int16) & ~1).view(torch.bfloat16)
        return rows

    def _damaged(self, given: ExpertInput, weights: ExpertWeights) -> tuple[ExpertInput, ExpertWeights]:
        """The arguments, wrong for some bugs."""
        if self._bug == "unweighted":
            return given._replace(weights=torch.ones_like(given.weights)), weights
        if self._bug == "gate for up":
            return given, weights._replace(w1=weights.w1.roll(weights.w1.shape[1] // 2, 1))
        if self._bug == "forgets an expert":
            mask = weights.mask.clone()
            mask[-1] = 0
            return given, weights._replace(mask=mask, w1=weights.w1[:-1], w2=weights.w2[:-1])
        if self._bug == "other expert":
            return given, weights._replace(w2=weights.w2.roll(1, 0))
        return given, weights


TRANSPORT = Plugin(make=BrokenTransport, version="0.1", options=TransportOptions)
EXPERTS = Plugin(make=BrokenExperts, version="0.1", options=ExpertsOptions)
