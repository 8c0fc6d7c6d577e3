"""The arm production: a caller's code in place of distbench's own, between the same transport and the same kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.callers import make_caller
from distbench.callers.base import Call, Caller, Steps
from distbench.callers.setting import Setting
from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.distributed.session import Session
from distbench.errors import DistbenchError, Unsupported
from distbench.experts.aiter.adapter import AiterExperts
from distbench.experts.base import ExpertInput, Experts
from distbench.pipeline.layer import Inspector
from distbench.pipeline.parts import Parts
from distbench.pipeline.recv_bound import parse_sender_rows
from distbench.transport.base import Dispatched, Transport
from distbench.transport.mori.config import production_kernel
from distbench.verify.records import ResolvedCase
from distbench.workload.batch import TokenBatch

_WORD_DIGITS = 15


def caller_of(session: Session, resolved: ResolvedCase, experts: Experts) -> Caller:
    """The case's caller, with the same text on every rank. Collective.

    Raises:
        InvalidCase, Unsupported: on every rank, as `make_caller`; or the ranks have different texts.

    """
    case = resolved.case
    with session.together():
        caller = make_caller(_setting(session, resolved), _aiter(case, experts))
    text = caller.text
    session.require_same(
        int(text.sha256[:_WORD_DIGITS], 16), f"lifted text of {text.package}", "install the same release on all nodes"
    )
    return caller


def run_production(
    parts: Parts, inspect: Inspector, take: Callable[[Call], None], mark: Callable[[Stage], None]
) -> Tensor:
    """This rank's combined tokens, bf16 [n, H], of a pass of the caller's code; see `run_layer`. Collective.

    Sub-batches of two-batch overlap pass through the caller's code one after the other.
    """
    assert parts.caller is not None  # noqa: S101 - the arm runs only where there is one
    made = []
    for batch in _batches_of(parts):
        mark(Stage.DISPATCH)
        steps = _Steps(parts, batch, inspect, take, mark)
        made.append(parts.caller.run(batch.batch, parts.weights, batch.transport, steps))
    tokens = torch.cat(made) if len(made) > 1 else made[0]
    right = (parts.batch.ids.shape[0], parts.weights.w2.shape[1])
    if tokens.shape != right or tokens.dtype != torch.bfloat16:
        shape = f"{tokens.dtype} {list(tokens.shape)}".removeprefix("torch.")
        message = f"production ({parts.caller.text.label}) returns {shape} tokens: bfloat16 {list(right)} were sent"
        raise DistbenchError(message)
    return tokens


class _Batch(NamedTuple):
    """Tokens of one call of the caller's code: all of a rank's, or a sub-batch."""

    batch: TokenBatch
    transport: Transport
    sources: Callable[[], Tensor]
    place: int


def _batches_of(parts: Parts) -> list[_Batch]:
    halves = [_Batch(one.batch, one.transport, one.sources, one.place) for one in parts.sub_batches]
    return halves or [_Batch(parts.batch, parts.transport, parts.transport.sources, 0)]


class _Steps(Steps):
    """The stages of a pass of the caller's code: marks, checks, and what the observer sees."""

    def __init__(
        self,
        parts: Parts,
        batch: _Batch,
        inspect: Inspector,
        take: Callable[[Call], None],
        mark: Callable[[Stage], None],
    ) -> None:
        self._parts, self._batch, self._inspect, self._take, self._mark = parts, batch, inspect, take, mark

    def dispatched(self) -> None:
        """See `Steps.dispatched`."""
        self._mark(Stage.TRUNCATE)

    def given(self, given: ExpertInput) -> None:
        """See `Steps.given`."""
        self._mark(Stage.EXPERTS)
        self._inspect.given(given, self._batch.place)
        self._parts.experts.check(given, self._parts.weights)

    def made(self, dispatched: Dispatched, call: Call) -> None:
        """See `Steps.made`."""
        self._mark(Stage.CHECK)
        self._take(call)
        self._inspect(self._batch.sources(), dispatched, call.given, call.output, self._batch.place)
        self._mark(Stage.COMBINE)


def _setting(session: Session, resolved: ResolvedCase) -> Setting:
    case = resolved.case
    return Setting(
        case=case,
        rank=session.rank,
        device=session.device,
        limit=resolved.limit if case.limit_key == "limit" else None,
        kernel=production_kernel(case, session.local_ranks),
        sender_rows=parse_sender_rows(case),
    )


def _aiter(case: Case, experts: Experts) -> AiterExperts:
    if not isinstance(experts, AiterExperts):
        message = f"caller = {case.caller}: production calls aiter's fused_moe; use experts aiter"
        raise Unsupported(message)
    return experts
