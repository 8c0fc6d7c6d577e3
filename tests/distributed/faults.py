"""Damage at the boundary of each stage, for tests that prove its detection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.experts import make_experts
from distbench.experts.base import ExpertInput, Experts, ExpertWeights
from distbench.experts.selection.choice import KernelChoice
from distbench.pipeline.run_case import run_case
from distbench.transport import make_transport
from distbench.transport.base import Dispatched, Transport
from distbench.transport.collective.transport import CollectiveTransport
from distbench.verify.records import Outcome
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload

ARM_CALLS = ("padded", "control", "repadded", "truncated")


def flip(rows: Tensor, row: int = 0, byte: int = 3, bit: int = 0) -> None:
    """Flip one bit of one row, in place."""
    rows.view(torch.uint8)[row, byte] ^= 1 << bit


def swap(rows: Tensor) -> None:
    """Exchange the first two rows, in place."""
    rows[[0, 1]] = rows[[1, 0]].clone()


def _swap_received(received: Dispatched) -> None:
    for part in received[:4]:
        if part is not None:
            swap(part)


def _other_expert(ids: Tensor) -> None:
    """Give the first row another expert of the same rank for its first local slot; El is 4 and E 16 here."""
    ids[0] = ids[0] ^ 1


DISPATCH: dict[str, Callable[[Dispatched], object]] = {
    "flip the lowest bit of a received element": lambda received: flip(received.hidden, byte=100),
    "flip a sign": lambda received: flip(received.hidden, byte=101, bit=7),
    "swap two received rows": _swap_received,
    "swap payloads only": lambda received: swap(received.hidden),
    "swap weights only": lambda received: received.weights[0].mul_(2),
    "lowest bit of a weight": lambda received: flip(received.weights, byte=0),
    "wrong expert id": lambda received: _other_expert(received.ids),
    "id of no expert": lambda received: received.ids[0].fill_(-1),
    "drop a row": lambda received: received.hidden[0].fill_(float("nan")),
    "stale row": lambda received: received.hidden[0].copy_(received.hidden[1]),
    "one row fewer": lambda received: received.total_recv.sub_(1),
}
EXPERTS: dict[str, Callable[[Tensor], object]] = {
    "flip the lowest bit of a result": lambda rows: flip(rows, byte=2),
    "swap two results": swap,
    "negative zero": lambda rows: rows[:2].masked_fill_(rows[:2] == 0, -0.0),
    "drop a contribution": lambda rows: rows[0].zero_(),
    "double a contribution": lambda rows: rows[0].mul_(2),
}
COMBINE: dict[str, Callable[[Tensor], object]] = {
    "flip the lowest bit of a token": lambda rows: flip(rows, byte=2),
    "swap two tokens": swap,
    "drop a token": lambda rows: rows[0].zero_(),
    "multiply by the number of ranks": lambda rows: rows.mul_(4),
    "negative zeros": lambda rows: rows.masked_fill_(rows == 0, -0.0),
}
FAULTS: dict[str, list[str]] = {"dispatch": [*DISPATCH], "experts": [*EXPERTS], "combine": [*COMBINE]}


class FaultyTransport(Transport):
    """A transport that damages the result of dispatch or combine in one call."""

    def __init__(self, inner: Transport, stage: str, fault: str, call: int) -> None:
        self.capacity, self.facts, self.sum_order = inner.capacity, inner.facts, inner.sum_order
        self._inner, self._stage, self._fault, self._call = inner, stage, fault, call
        self._calls = -1

    def dispatch_send(self, batch: TokenBatch) -> None:
        self._calls += 1
        self._inner.dispatch_send(batch)

    def dispatch_recv(self) -> Dispatched:
        received = self._inner.dispatch_recv()
        if self._stage == "dispatch" and self._calls == self._call:
            DISPATCH[self._fault](received)
        return received

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        self._inner.combine_send(expert_out, ids)

    def combine_recv(self) -> Tensor:
        combined = self._inner.combine_recv()
        if self._stage == "combine" and self._calls == self._call:
            COMBINE[self._fault](combined)
        return combined

    def sources(self) -> Tensor:
        return self._inner.sources()

    def forget(self) -> None:
        self._inner.forget()

    def close(self) -> None:
        self._inner.close()


class FaultyExperts(Experts):
    """Experts that damage their result in one call."""

    def __init__(self, inner: Experts, fault: str, call: int) -> None:
        self._inner, self._fault, self._call = inner, fault, call
        self._calls = -1

    def selection(self, rows: int) -> KernelChoice:
        return self._inner.selection(rows)

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        self._calls += 1
        rows = self._inner(given, weights)
        if self._calls == self._call:
            EXPERTS[self._fault](rows)
        return rows


def run_with_fault(session: Session, case: Case, stage: str, fault: str, arm: str, rank: int) -> Outcome | None:
    """Run `case` with `fault` on `rank` in `arm`; return the outcome on rank 0."""
    call = ARM_CALLS.index(arm)

    def transport(*arguments: Any) -> Transport:
        return FaultyTransport(make_transport(*arguments), stage, fault, call)

    def experts(case: Case) -> Experts:
        return FaultyExperts(make_experts(case), fault, call)

    if session.rank != rank:
        return run_case(session, case)
    if stage == "experts":
        with patch("distbench.pipeline.run_case.make_experts", experts):
            return run_case(session, case)
    with patch("distbench.pipeline.run_case.make_transport", transport):
        return run_case(session, case)


def run_with_weights_of_another_expert(session: Session, case: Case, rank: int) -> Outcome | None:
    """Run `case` with two experts of `rank` exchanged."""
    local_weights = Workload.local_weights

    def exchanged(workload: Workload, of: int) -> tuple[Tensor, Tensor]:
        w1, w2 = local_weights(workload, of)
        if session.rank == rank:
            swap(w1)
        return w1, w2

    with patch.object(Workload, "local_weights", exchanged):
        return run_case(session, case)


def run_with_foreign_ids_in_combine(session: Session, case: Case, rank: int) -> Outcome | None:
    """Run `case` with other ids of the right shape passed to combine on `rank`."""
    combine = CollectiveTransport.combine

    def rolled(transport: CollectiveTransport, rows: Tensor, ids: Tensor) -> Tensor:
        return combine(transport, rows, ids.roll(1, 0) if session.rank == rank else ids)

    with patch.object(CollectiveTransport, "combine", rolled):
        return run_case(session, case)
