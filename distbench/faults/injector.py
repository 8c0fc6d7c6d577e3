"""Injects a case's faults around its transport, its experts and its cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distbench.case.injection import Injection, is_brought, parse_inject
from distbench.case.plugins import FAULT, load_object
from distbench.case.spec import Case
from distbench.case.stages import SUB_BATCHES, Stage
from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.session import Session
from distbench.errors import InvalidCase
from distbench.experts.base import Cut, ExpertInput, Experts, ExpertsAround, ExpertWeights
from distbench.faults import combine, dispatch, experts, limit, overlap, process, symmetric
from distbench.faults.base import Fault, Scene
from distbench.transport.base import Dispatched, Transport, TransportAround
from distbench.utils.text import closest
from distbench.workload.batch import TokenBatch

FAULTS: dict[str, type[Fault]] = {
    kind.name: kind
    for module in (limit, dispatch, experts, combine, process, overlap, symmetric)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Fault) and hasattr(kind, "name")  # bases have none
}


_MUTANT = "mutant"


def is_plugin(injection: Injection) -> bool:
    """Whether a fault is that of another package."""
    return injection.name not in (*FAULTS, _MUTANT) and is_brought(injection.name)


def fault_kind(injection: Injection) -> type[Fault]:
    """Return the fault class that `injection` names.

    Raises:
        InvalidCase: no such fault.
    """
    if injection.name == _MUTANT:
        from distbench.faults.mutants.fault import mutant_kind  # noqa: PLC0415 - loaded only where a fault is injected

        return mutant_kind(injection)
    if is_plugin(injection):
        return _brought(injection.name)
    if injection.name not in FAULTS:
        near = closest(injection.name, FAULTS)
        message = f"inject = {injection.name}: no such fault{near}; allowed are {', '.join(FAULTS)}, mutant"
        raise InvalidCase(message)
    return FAULTS[injection.name]


def _brought(name: str) -> type[Fault]:
    """Return the fault class of a plugin.

    Raises:
        InvalidCase, Unsupported: as `load_object`; or it is no subclass of Fault, or leaves out its name, bug or stage.
    """
    found = load_object(FAULT, name)
    if not (isinstance(found, type) and issubclass(found, Fault)):
        message = f"inject = {name}: is no subclass of distbench.plugins.Fault; name the class of a fault"
        raise InvalidCase(message)
    missing = [one for one in ("name", "bug", "stage") if not isinstance(getattr(found, one, None), str)]
    if missing:
        message = f"inject = {name}: the class has no {missing[0]}; set name, bug and stage, as texts"
        raise InvalidCase(message)
    return found


def make_faults(case: Case, scene: Scene) -> list[Fault]:
    """Return the faults that `case` injects, in its order.

    Raises:
        InvalidCase: no such fault, or it has no such option.
    """
    return [fault_kind(injection)(scene, injection) for injection in parse_inject(case.inject)]


def check_faults(case: Case) -> None:
    """Refuse unknown faults before a rank is started; those of plugins are left to the ranks.

    Raises:
        InvalidCase: see `make_faults`.
    """
    for injection in parse_inject(case.inject):
        if not is_plugin(injection):
            fault_kind(injection)(_scene(case), injection)


def check_plugins(session: Session, case: Case) -> None:
    """Refuse faults of plugins that cannot be injected, on all ranks. Collective where the case has some.

    Raises:
        InvalidCase, Unsupported: see `make_faults`.
    """
    if any(map(is_plugin, parse_inject(case.inject))):
        with session.together():
            make_faults(case, _scene(case))


def _scene(case: Case) -> Scene:
    return Scene(0, case, Heartbeat(None), lambda: torch.empty(0, 2))


class SubBatch(Protocol):
    """A sub-batch of two-batch overlap, as `pipeline.sub_batches` has it."""

    @property
    def place(self) -> int:
        """Its place among `SUB_BATCHES`."""

    @property
    def batch(self) -> TokenBatch:
        """Its tokens on this rank."""

    @property
    def transport(self) -> Transport:
        """Its transport."""

    @property
    def experts(self) -> Experts:
        """The experts."""


class Injector:
    """The faults of one case on one rank."""

    def __init__(  # noqa: PLR0913 - the parts that it wraps, and their place
        self,
        session: Session,
        case: Case,
        transport: Transport,
        compute: Experts,
        sub_batch: str = "",
        other: TokenBatch | None = None,
    ) -> None:
        """Wrap `transport` and `compute`; the wrapped ones are `transport` and `experts`, `inner` is `compute`.

        With two-batch overlap they are those of `sub_batch`, and `other` are the other one's tokens.
        """
        self.inner = compute
        self.beside: Injector | None = None
        self.faults = make_faults(
            case,
            Scene(session.rank, case, session.heartbeat, transport.sources, transport, compute, sub_batch, other),
        )
        self.transport = _FaultyTransport(transport, self.faults)
        self.experts = _FaultyExperts(compute, self.faults)

    @property
    def hits(self) -> dict[str, int]:
        """Number of changes by each fault on this rank, by the fault's index in the case's list."""
        others = [0] * len(self.faults) if self.beside is None else list(self.beside.hits.values())
        return {str(place): fault.hits + others[place] for place, fault in enumerate(self.faults)}

    def accepted(self, outputs: Mapping[str, Tensor]) -> dict[str, dict[str, bool]]:
        """Return the verdicts of public rules on this rank's tokens, by the fault's index and by rule."""
        said = {str(place): fault.accepted(outputs) for place, fault in enumerate(self.faults)}
        return {place: rules for place, rules in said.items() if rules}

    def around(self, cut: Cut) -> Cut:
        """Return `cut` with the faults of the cut."""

        def damaged(dispatched: Dispatched) -> ExpertInput:
            given = cut(dispatched)
            for fault in self.faults:
                if fault.active:
                    given = fault.cut(dispatched, given)
            return given

        return damaged

    def leave(self) -> None:
        """Notify the faults that the last barrier has passed."""
        for fault in self.faults:
            if fault.active:
                fault.leave()
        if self.beside is not None:
            self.beside.leave()


def inject_both(session: Session, case: Case, sub_batches: Sequence[SubBatch]) -> tuple[Injector, ...]:
    """Return the faults around each of two sub-batches; the first injector speaks for both."""
    first, second = (
        Injector(session, case, one.transport, one.experts, SUB_BATCHES[one.place], sub_batches[1 - one.place].batch)
        for one in sub_batches
    )
    first.beside = second
    return first, second


class _FaultyTransport(TransportAround):
    def __init__(self, inner: Transport, faults: list[Fault]) -> None:
        super().__init__(inner)
        self._faults = faults

    def forget(self) -> None:
        for fault in self._faults:
            if fault.active:
                fault.begin()
        self._inner.forget()

    def dispatch_send(self, batch: TokenBatch) -> None:
        _enter(self._faults, Stage.DISPATCH)
        for fault in self._faults:
            if fault.active:
                batch = fault.sent(batch)
        self._inner.dispatch_send(batch)

    def dispatch_recv(self) -> Dispatched:
        dispatched = self._inner.dispatch_recv()
        for fault in self._faults:
            if fault.active:
                dispatched = fault.received(dispatched)
        return dispatched

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        _enter(self._faults, Stage.COMBINE)
        for fault in self._faults:
            if fault.active:
                expert_out, ids = fault.returned(expert_out, ids)
        self._inner.combine_send(expert_out, ids)

    def combine_recv(self) -> Tensor:
        tokens = self._inner.combine_recv()
        for fault in self._faults:
            if fault.active:
                tokens = fault.combined(tokens)
        return tokens


class _FaultyExperts(ExpertsAround):
    """Experts with faults around them; values are checked in the call, once the faults have damaged them."""

    def __init__(self, inner: Experts, faults: list[Fault]) -> None:
        super().__init__(inner)
        self._faults = faults

    def check(self, given: ExpertInput, weights: ExpertWeights) -> None:
        """Check in the call."""

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        _enter(self._faults, Stage.EXPERTS)
        for fault in self._faults:
            if fault.active:
                given = fault.asked(given)
        self.inner.check(given, weights)
        rows = self.inner(given, weights)
        for fault in self._faults:
            if fault.active:
                rows = fault.computed(given, rows)
        return rows


def _enter(faults: list[Fault], stage: str) -> None:
    for fault in faults:
        if fault.active:
            fault.enter(stage)
