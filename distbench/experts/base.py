"""The call signature of `aiter.fused_moe`, which every implementation here shares (docs/semantics.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distbench.experts.selection.choice import KernelChoice
from distbench.transport.base import Dispatched


class Experts(ABC):
    """Computes the experts of one rank with a kernel that the row count selects.

    Experts whose kernels are compiled when they are first called override `warm_up`; those that compute garbage or
    fault on some values override `check`; those that run an external package override `about`.
    """

    @abstractmethod
    def selection(self, rows: int) -> KernelChoice:
        """Return the kernel that a call with `rows` allocated rows runs."""

    @abstractmethod
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

    def warm_up(self, w1: Tensor, w2: Tensor, expert_mask: Tensor, rows: tuple[int, ...]) -> None:  # noqa: B027
        """Compile the kernels that calls with these numbers of rows need, once per node."""

    def check(self, topk_ids: Tensor, expert_mask: Tensor, num_local_tokens: Tensor) -> None:  # noqa: B027
        """Refuse bad values of arguments, which waits for the device: for checked passes, never timed or captured ones.

        Raises:
            DistbenchError: names the value and the bound.
        """

    def about(self) -> dict[str, Any]:
        """Return, by package name, the facts that decide its results besides the case: versions, devices, tables."""
        return {}


class ExpertInput(NamedTuple):
    """Arguments of the experts: rows [M, .], where M selects the kernel, and the live-row count [1]."""

    hidden: Tensor
    scales: Tensor | None
    weights: Tensor
    ids: Tensor
    num_local_tokens: Tensor

    def fields(self) -> list[Tensor]:
        """Arguments of M rows: hidden, scales where there are some, weights, ids."""
        return [part for part in (self.hidden, self.scales, self.weights, self.ids) if part is not None]

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
