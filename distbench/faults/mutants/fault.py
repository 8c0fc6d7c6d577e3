"""A mutant of the corpus as a fault that a case can inject: `mutant:name=gelu-for-silu,arm=truncated`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from distbench.case.injection import Injection
from distbench.case.stages import Arm, Stage
from distbench.errors import InvalidCase, Unsupported
from distbench.experts.base import ExpertInput
from distbench.experts.steps import Steps
from distbench.faults.base import EVERYWHERE, Fault, Scene
from distbench.faults.mutants import CORPUS
from distbench.faults.mutants.corpus import BOUNDARIES, SUM, Mutant, Site
from distbench.faults.mutants.rules import accepted_by
from distbench.faults.options import Option, one_of
from distbench.transport.base import Dispatched
from distbench.workload.batch import TokenBatch

NAME = "mutant"

T = TypeVar("T")


class MutantFault(Fault):
    """One mutant of the corpus, on all ranks unless one is named. `hits` counts the calls in which it took effect."""

    name = NAME
    mutant: ClassVar[Mutant]

    def __init__(self, scene: Scene, injection: Injection) -> None:
        """Take effect as `injection` says.

        Raises:
            Unsupported: the mutant patches the reference experts or the collective transport, and the case uses
                another part.
            InvalidCase: see `Fault`.
        """
        super().__init__(scene, injection)
        part = unfit(self.mutant, scene.case.experts, scene.case.transport, scene.case.device)
        if part:
            message = f"inject = {NAME}: {self.mutant.name} {part}"
            raise Unsupported(message)
        self._kept: dict[str, Tensor] = {}
        self._patched = self._patched_steps()

    @classmethod
    def all_options(cls, ranks: int) -> dict[str, Option]:
        """See `Fault.all_options`; the default rank is all of them."""
        words = (EVERYWHERE, *map(str, range(ranks)))
        return super().all_options(ranks) | {"rank": one_of(*words), "name": one_of("", *CORPUS)}

    def sent(self, batch: TokenBatch) -> TokenBatch:
        """See `Fault.sent`."""
        return self._at("sent", batch, batch)

    def received(self, dispatched: Dispatched) -> Dispatched:
        """See `Fault.received`."""
        return self._at("received", dispatched, dispatched)

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """See `Fault.cut`."""
        return self._at("cut", given, dispatched, given)

    def asked(self, given: ExpertInput) -> ExpertInput:
        """See `Fault.asked`; from here on the experts compute with the patched steps."""
        if self._patched is not None:
            self.hits += 1
            self.scene.experts.steps = self._patched  # type: ignore[union-attr]
        return self._at("asked", given, given)

    def computed(self, given: ExpertInput, rows: Tensor) -> Tensor:
        """See `Fault.computed`; the experts get their own steps back."""
        if self._patched is not None:
            self.scene.experts.steps = self._right_steps  # type: ignore[union-attr]
        return self._at("computed", rows, given, rows)

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `Fault.returned`; from here on the transport adds with the patched sum."""
        if SUM in self.mutant.patches:
            self.hits += 1
            mover = self.scene.transport.mover  # type: ignore[union-attr]
            self._right_sum = mover.sum_in_order
            mover.sum_in_order = self._patch(SUM, self._right_sum)
        return self._at("returned", (rows, ids), rows, ids)

    def combined(self, tokens: Tensor) -> Tensor:
        """See `Fault.combined`; the transport gets its own sum back."""
        if SUM in self.mutant.patches:
            self.scene.transport.mover.sum_in_order = self._right_sum  # type: ignore[union-attr]
        return self._at("combined", tokens, tokens)

    def accepted(self, outputs: Mapping[str, Tensor]) -> dict[str, bool]:
        """See `Fault.accepted`: of gaussian inputs, where truncated has the mutant and padded does not."""
        case = self.scene.case
        if case.numerics == "exact" or self.chosen["arm"] != Arm.TRUNCATED or Arm.TRUNCATED not in outputs:
            return {}
        return accepted_by(case, outputs[Arm.TRUNCATED], outputs[Arm.PADDED])

    def _at(self, seam: str, unchanged: T, *passing: Any) -> T:
        if seam not in self.mutant.patches:
            return unchanged
        self.hits += 1
        changed: T = self._patch(seam, None)(*passing)
        return changed

    def _patch(self, seam: str, right: Any) -> Callable[..., Any]:
        site = Site(self.scene.case, self.scene.rank, right, self._kept)
        return partial(self.mutant.patches[seam], site)

    def _patched_steps(self) -> Steps | None:
        """Return the steps of the case's experts with some of them replaced; None where the mutant patches none."""
        inside = [seam for seam in self.mutant.patches if seam not in BOUNDARIES and seam != SUM]
        if not inside or self.scene.experts is None:
            return None
        right = self._right_steps = self.scene.experts.steps  # type: ignore[attr-defined]
        patched = Steps(right.formula)
        vars(patched).update({seam: self._patch(seam, getattr(right, seam)) for seam in inside})
        return patched


def unfit(mutant: Mutant, experts: str, transport: str, device: str) -> str:
    """Reason why a mutant cannot be put into these parts; empty if it can."""
    if SUM in mutant.patches and transport != "collective":
        return f"patches the sum of the collective transport; the case has transport {transport}"
    if SUM in mutant.patches and device == "cuda":
        return "patches the sum that the collective transport makes on the CPU; the case has device cuda"
    if not all(seam in BOUNDARIES or seam == SUM for seam in mutant.patches) and experts != "reference":
        return f"patches the arithmetic of the reference experts; the case has experts {experts}"
    return ""


def mutant_kind(injection: Injection) -> type[Fault]:
    """Return the fault of the mutant that `injection` names.

    Raises:
        InvalidCase: no such mutant.
    """
    mutant = CORPUS.get(injection.options.get("name", ""))
    if mutant is None:
        asked = injection.options.get("name", "")
        message = f"inject = {NAME}: name = {asked!r:.60}: no such mutant; see `distbench mutants --list`"
        raise InvalidCase(message)
    seam = mutant.seams[0]
    stage = Stage.COMBINE if seam == SUM else BOUNDARIES.get(seam, Stage.EXPERTS)
    attributes = {"mutant": mutant, "bug": mutant.bug, "stage": stage, "__doc__": mutant.text}
    return type(f"Mutant_{mutant.name}", (MutantFault,), attributes)
