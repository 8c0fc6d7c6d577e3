"""Faults of kernels over symmetric memory: of their counters, signals and barriers (docs/symmetric.md).

They are imitated by the kernels themselves, so only transport symmetric has them. A race does not show in every pass;
docs/symmetric.md has the rates that were measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

from torch import Tensor

from distbench.case.stages import Arm, Stage
from distbench.faults.base import Fault
from distbench.faults.options import one_of, real
from distbench.transport.base import Dispatched, TransportAround

if TYPE_CHECKING:
    from distbench.transport.symmetric.transport import SymmetricTransport


class _OfKernels(Fault):
    """A fault that the kernels of its rank imitate: `flaw` names it to them, from the start of its stage to the end."""

    transport = "symmetric"
    flaw = ""

    @property
    def kernels(self) -> SymmetricTransport:
        """The transport, whose next call the fault changes."""
        made = self.scene.transport
        while isinstance(made, TransportAround):
            made = made._inner  # noqa: SLF001 - a plugin may have other uses for a public name
        return cast("SymmetricTransport", made)

    def enter(self, stage: str) -> None:
        """Imitate the flaw in this call, if `stage` is the one in which it happens."""
        if self.flaw and stage == self.chosen.get("stage", self.stage):
            self.hits += 1
            self.kernels.flaw = self.flaw

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Imitate nothing in combine."""
        self.kernels.flaw = ""
        return dispatched

    def combined(self, tokens: Tensor) -> Tensor:
        """Imitate nothing in the following calls."""
        self.kernels.flaw = ""
        return tokens


class StaleSlot(_OfKernels):
    """Every fourth token's row takes a slot on each rank, and its payload is not written there."""

    name, stage = "stale-slot", Stage.DISPATCH
    flaw = "stale slot"
    bug = "mori 80, 484's class: a slot is counted as received and holds an earlier call's row"
    needs = "tokens on its rank that go to two ranks"


class CountNotZeroed(_OfKernels):
    """Two slots of an earlier call are still counted when a dispatch begins: its rows lie behind them."""

    name, stage = "count-not-zeroed", Stage.DISPATCH
    bug = "mori's constructor before 1.2.4, its combine's total_recv = 0: counters that a call inherits"
    needs = "a receive buffer with room for two rows more"

    def begin(self) -> None:
        """Leave a count, while no rank dispatches."""
        self.hits += 1
        self.kernels.leave_count(2)


class ReleaseBeforeData(_OfKernels):
    """The rank signals that its rows are written, and writes their payload `ms` later."""

    name, stage = "release-before-data", Stage.DISPATCH
    flaw = "no payload"
    bug = "mori #522's class: a signal is visible before the stores that it stands for"
    options = {"ms": real(50.0, 0.0, 60_000.0)}
    needs = "tokens on its rank that go to two ranks"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Write it, late."""
        super().received(dispatched)
        time.sleep(self.chosen["ms"] / 1000)
        self.kernels.write_late("payload")
        return dispatched


class SignalLost(_OfKernels):
    """The rank never signals that it has come to the end of dispatch, or to the middle of combine."""

    name, stage, verdict, arm = "signal-lost", Stage.DISPATCH, "HANG", Arm.TRUNCATED
    flaw = "no signal"
    bug = "mori #494, 101: a rank waits for a signal that does not come, without a time limit"
    options = {"stage": one_of(Stage.DISPATCH, Stage.COMBINE)}
    needs = "a limit, for arm truncated"
    shape = {"stage_timeouts": "dispatch=1.5,combine=1.5", "policy": "unchecked"}


class WaitLeftOut(_OfKernels):
    """The rank does not wait for the others at the end of dispatch, or in the middle of combine: a race."""

    name, stage = "wait-left-out", Stage.DISPATCH
    flaw = "no wait"
    bug = "mori 93, 494's class: a barrier is left out, and rows are read that are not there yet"
    options = {"stage": one_of(Stage.DISPATCH, Stage.COMBINE)}
    race = True


class EarlyReuse(_OfKernels):
    """The rank begins its next dispatch while its peers still read the rows of this one: a race."""

    name, stage = "early-reuse", Stage.DISPATCH
    bug = "mori 80, 484: a rank that is a call ahead overwrites rows that a slow one has not read"
    needs = "tokens on its rank that go to other ranks"
    race = True

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Write rows of zeros into the first slots of the peers."""
        self.hits += 1
        self.kernels.write_late("reuse")
        return dispatched


class FenceLeftOut(_OfKernels):
    """Counters and signals order no other memory accesses, in both calls: a race."""

    name, stage = "fence-left-out", Stage.DISPATCH
    flaw = "fence"
    bug = "mori #522: store visibility before dispatch's grid barrier"
    race = True

    def enter(self, stage: str) -> None:
        """Order nothing in this call."""
        self.hits += 1
        self.kernels.flaw = self.flaw
