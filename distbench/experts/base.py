"""The call signature of `aiter.fused_moe`, which every implementation here shares (docs/semantics.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from distbench.experts.selection.choice import KernelChoice
from distbench.transport.base import Dispatched


class Experts(Protocol):
    """Computes the experts of one rank with a kernel that the row count selects."""

    def selection(self, rows: int) -> KernelChoice:
        """Return the kernel that a call with `rows` allocated rows runs."""

    def __call__(  # noqa: PLR0913 - the argument list is aiter's
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weight: Tensor,
        topk_ids: Tensor,
        *,
        expert_mask: Tensor,
        num_local_tokens: Tensor,
        a1_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Sum each row's local experts, weighted: [M, H] of `dtype`; rows at and past num_local_tokens are undefined.

        hidden_states [M, H] in bf16, or float8 with a1_scale [M, H/128] float32; w1 [El, 2I, H], gate rows before up
        rows; w2 [El, H, I]; topk_weight [M, k] float32; topk_ids [M, k] int32, global; expert_mask [E] int32, 1 where
        the expert is local; num_local_tokens [1] int32. The result is valid until the next call.
        """


@runtime_checkable
class CompiledExperts(Protocol):
    """Experts whose kernels are compiled when they are first called."""

    def warm_up(self, w1: Tensor, w2: Tensor, expert_mask: Tensor, rows: tuple[int, ...]) -> None:
        """Compile the kernels that calls with these numbers of rows need, once per node."""


class CheckedExperts(Protocol):
    """Experts that compute garbage or fault on some values. The host checks for them, which waits for the device."""

    def check(self, topk_ids: Tensor, expert_mask: Tensor, num_local_tokens: Tensor) -> None:
        """Refuse bad values of arguments: for checked passes, never for timed or captured ones.

        Raises:
            DistbenchError: names the value and the bound.
        """


def check_values(experts: Experts, topk_ids: Tensor, expert_mask: Tensor, num_local_tokens: Tensor) -> None:
    """Let experts that need it check the values of their coming call."""
    if hasattr(experts, "check"):  # runs in every pass, and isinstance takes 9 us to compare protocols
        experts.check(topk_ids, expert_mask, num_local_tokens)


class PackageUser(Protocol):
    """A part of the layer that runs an external package."""

    def about(self) -> dict[str, Any]:
        """Return, by package name, the facts that decide its results besides the case: versions, devices, tables."""


def facts_of(part: object) -> dict[str, Any]:
    """Return a part's facts about its packages; empty where it uses none."""
    facts: dict[str, Any] = part.about() if hasattr(part, "about") else {}
    return facts


class ExpertInput(NamedTuple):
    """Arguments of the experts: rows [M, .], where M selects the kernel, and the live-row count [1]."""

    hidden: Tensor
    scales: Tensor | None
    weights: Tensor
    ids: Tensor
    num_local_tokens: Tensor

    @property
    def rows(self) -> int:
        """M, the allocated rows."""
        return self.hidden.shape[0]


Cut = Callable[[Dispatched], ExpertInput]


class ExpertWeights(NamedTuple):
    """A rank's experts: w1 [El, 2I, H], w2 [El, H, I], both bf16; mask [E] int32, 1 where the expert is local."""

    w1: Tensor
    w2: Tensor
    mask: Tensor
