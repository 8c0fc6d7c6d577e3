"""MoRI's operator as callers use it: the transport of the pass under way, and the quantiser of the sender."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distbench.callers.base import Steps
from distbench.callers.fused_moe import WatchedFusedMoe
from distbench.errors import DistbenchError, InvalidCase, Unsupported
from distbench.experts.base import ExpertWeights
from distbench.transport.base import Dispatched, Transport
from distbench.utils.text import one_line
from distbench.workload.batch import TokenBatch


class _Pass(NamedTuple):
    batch: TokenBatch
    transport: Transport
    steps: Steps


class MoriOperator:
    """Dispatch and combine by the transport of the pass; the arguments of MoRI's launches have no effect."""

    def __init__(self, fused: WatchedFusedMoe) -> None:
        self._fused = fused
        self._pass: _Pass | None = None
        self._dispatched: Dispatched | None = None

    @contextmanager
    def layer(
        self, label: str, batch: TokenBatch, weights: ExpertWeights, transport: Transport, steps: Steps
    ) -> Iterator[None]:
        """Run one pass of the caller `label` inside.

        Errors in lifted code, also those that reach it from the transport or the kernels, name its release.

        Raises:
            DistbenchError: such an error; or the pass did not dispatch, call `fused_moe` and combine once each.

        """
        self._pass, self._dispatched = _Pass(batch, transport, steps), None
        try:
            with named(label), self._fused.watching(weights, steps):
                yield
                if self._pass is not None:
                    message = "the pass ended without combine"
                    raise DistbenchError(message)
        finally:
            self._pass = self._dispatched = None

    def dispatch(  # noqa: PLR0913 - MoRI's signature
        self,
        input: Tensor,  # noqa: A002
        weights: Tensor,
        scales: Tensor | None,
        indices: Tensor,
        block_num: int = -1,  # noqa: ARG002
        rdma_block_num: int = -1,  # noqa: ARG002
        warp_per_block: int = -1,  # noqa: ARG002
        call_local_expert_count: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Send rows: hidden, weights, scales, ids and total_recv of the receive buffer."""
        assert not call_local_expert_count  # noqa: S101 - no recorder asks for it
        under_way = self._under_way("dispatch", again=self._dispatched is not None)
        self._dispatched = got = under_way.transport.dispatch(TokenBatch(input, scales, weights, indices))
        under_way.steps.dispatched()
        return got.hidden, got.weights, got.scales, got.ids, got.total_recv

    def combine(  # noqa: PLR0913 - MoRI's signature
        self,
        input: Tensor,  # noqa: A002
        weights: None,
        indices: Tensor,
        block_num: int = -1,  # noqa: ARG002
        rdma_block_num: int = -1,  # noqa: ARG002
        warp_per_block: int = -1,  # noqa: ARG002
    ) -> tuple[Tensor, None]:
        """Return expert rows to their senders."""
        under_way = self._under_way("combine", again=False)
        dispatched = self._dispatched
        assert dispatched is not None  # noqa: S101 - `fused_moe` had rows of it
        under_way.steps.made(dispatched, self._fused.call(input))
        self._pass = None
        return under_way.transport.combine(input, indices), weights

    def quantizer(self, quant_type: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        """The sender's quantiser: the workload's own rows, which are quantised already."""

        def quantize(rows: Tensor, quant_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            batch = self._under_way("the quantiser", again=False).batch
            assert batch.scales is not None  # noqa: S101
            if quant_type.name != "per_1x128" or batch.hidden.dtype != quant_dtype or rows.shape != batch.hidden.shape:
                message = f"the sender quantises {list(rows.shape)} rows to {quant_dtype} by {quant_type.name}"
                raise DistbenchError(message)
            return batch.hidden, batch.scales

        return quantize

    def _under_way(self, what: str, *, again: bool) -> _Pass:
        if self._pass is None or again:
            message = f"the caller called {what} twice in a pass; distbench follows one dispatch and one combine"
            raise DistbenchError(message)
        return self._pass


@contextmanager
def named(label: str) -> Iterator[None]:
    """Errors inside name the caller's release, except refusals of the case, which pass as they are."""
    try:
        yield
    except (InvalidCase, Unsupported):
        raise
    except Exception as error:
        kind = "" if isinstance(error, DistbenchError) else f"{type(error).__name__}: "
        message = f"{kind}{one_line(error)} (in a pass of production, {label})"
        raise DistbenchError(message) from error
