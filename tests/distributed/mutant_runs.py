"""Mutants on real ranks, one pass each: changed output bits, and the fraction changed at the seam of the mutant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.experts import make_experts
from distbench.experts.base import Cut, ExpertInput
from distbench.experts.steps import Group
from distbench.faults.injector import Injector
from distbench.faults.mutants import CORPUS
from distbench.faults.mutants.corpus import Mutant, Site
from distbench.faults.mutants.fault import MutantFault
from distbench.pipeline.layer import run_layer
from distbench.pipeline.parts import Parts
from distbench.pipeline.run_case import _prepare
from distbench.pipeline.truncation import padded
from distbench.transport import make_transport
from distbench.transport.base import Dispatched


class Touch(NamedTuple):
    """Effect of one mutant on one rank.

    `changed`: bits of expert rows or of combined tokens differ. `rows` and `elements` are the shares of rows and of
    elements that it changed at its seam; of routes the share of their rows of the receive buffer, if that is less.
    """

    changed: bool
    rows: float
    elements: float


@torch.inference_mode()
def touches_of(session: Session, case: Case, names: list[str]) -> dict[str, Touch]:
    """Run the layer once without a mutant and once with each of `names`; nothing else differs. Collective."""
    session.heartbeat.arm = "padded"
    ready = _prepare(session, case)
    workload, batch = ready.inputs[0]
    parts = Parts(workload, batch, ready.weights.pop(), ready.transports[0], ready.experts.pop())
    clean = _made(session, case, parts, ready.counts[0], None)
    received = ready.resolved.traffic.total_recv[session.rank]
    found = {}
    for name in names:
        log = _Log(received, case.topk)
        made = _made(session, case, parts, ready.counts[0], (CORPUS[name], log))
        changed = not all(torch.equal(_bits(one), _bits(right)) for one, right in zip(made, clean, strict=True))
        found[name] = Touch(changed, log.rows, log.elements)
    session.heartbeat.arm = ""
    return found


def _made(
    session: Session, case: Case, parts: Parts, counts: Tensor, broken: tuple[Mutant, _Log] | None
) -> tuple[Tensor, Tensor]:
    """Expert rows and tokens of one pass; each pass has its own parts, so that atomic additions have one order."""
    cut: Cut = padded
    transport, experts = make_transport(session, case, counts, parts.batch), make_experts(case)
    if broken is not None:
        mutant, log = broken
        injected = msgspec.structs.replace(case, inject=f"mutant:name={mutant.name}")
        injector = Injector(session, injected, transport, experts)
        fault = injector.faults[0]
        assert isinstance(fault, MutantFault)
        patches = {seam: partial(_measured, patch, log) for seam, patch in mutant.patches.items()}
        type(fault).mutant = mutant._replace(patches=patches)
        fault._patched = fault._patched_steps()
        transport, experts, cut = injector.transport, injector.experts, injector.around(padded)
    seen = _Rows()
    given = parts.weights
    own = given._replace(
        w1=given.w1.clone(), w2=given.w2.clone(), mask=given.mask.clone()
    )  # some mutants write to them
    tokens = run_layer(parts.batch, own, transport, experts, cut, seen, lambda _: None)
    transport.close()
    return seen.rows, tokens.clone()


class _Rows:
    """Keeps the expert rows of a pass."""

    rows: Tensor

    def arrived(self, dispatched: Dispatched, sub_batch: int = 0) -> None: ...

    def given(self, given: ExpertInput, sub_batch: int = 0) -> None: ...

    def __call__(
        self,
        sources: Tensor,
        dispatched: Dispatched,  # noqa: ARG002
        given: ExpertInput,  # noqa: ARG002
        expert_out: Tensor,
        sub_batch: int = 0,  # noqa: ARG002
    ) -> None:
        self.rows = expert_out[: len(sources)].clone()


class _Log:
    """Largest fractions that differ at a seam over all calls; of larger buffers only the `live` rows count."""

    def __init__(self, live: int, topk: int) -> None:
        self.live, self.topk = live, topk
        self.rows = self.elements = 0.0

    def take(self, shares: list[tuple[float, float]]) -> None:
        """Record the smallest difference that is not zero: of a patch's result, or of the input that it passes on."""
        rows, elements = min((one for one in shares if one[1]), key=lambda one: one[1], default=(0.0, 0.0))
        self.rows, self.elements = max(self.rows, rows), max(self.elements, elements)


def _shares(log: _Log, after: Tensor, before: Tensor, group: Group | None) -> tuple[float, float]:
    """Fractions of rows and of elements that differ; of routes that of their rows, if smaller."""
    if after.shape != before.shape or after.ndim < 2:
        return 0.0, 0.0
    wrong = _bits(after) != _bits(before)
    if group is not None:
        real = group.routes < group.total
        wrong = wrong[real]
        rows = group.routes[real].div(log.topk, rounding_mode="floor")[wrong.any(1)].unique()
    wrong = wrong.flatten(0, -2)
    if group is None and len(wrong) > log.live * log.topk:
        wrong = wrong[: log.live]
    share = float(wrong.any(1).double().mean()) if len(wrong) else 0.0
    return share if group is None else min(share, len(rows) / log.live), float(wrong.double().mean())


def _measured(patch: Callable[..., Any], log: _Log, site: Site, *arguments: Any) -> Any:
    """Call a patch, and record its differences from its arguments and from the correct result."""
    before = [_copy(argument) for argument in arguments]
    group = next((one for one in arguments if isinstance(one, Group)), None)
    inside = site.right is not None
    fed: list[Tensor] = []

    def right(*inner: Any) -> Any:
        fed.append(inner[0].clone())
        return site.right(*inner)

    made = patch(site._replace(right=right) if inside else site, *arguments)
    flat = list(_tensors(before))
    if not inside:
        for after, old in zip(_tensors(made), flat[-len(list(_tensors(made))) :], strict=True):
            log.take([_shares(log, after, old, None)])
        return made
    if isinstance(made, Tensor):
        log.take([_shares(log, made, site.right(*before), group), *(_shares(log, one, flat[0], group) for one in fed)])
    else:
        log.take([_shares(log, one, flat[0], group) for one in fed])
    return made


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and not isinstance(value, Group):
        return type(value)(*map(_copy, value)) if hasattr(value, "_fields") else tuple(map(_copy, value))
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)) and not isinstance(value, Group):
        for one in value:
            yield from _tensors(one)
