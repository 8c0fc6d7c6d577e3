"""Faults of kernels over symmetric memory: of their counters, signals and barriers (docs/symmetric.md).

They are imitated by the kernels themselves, so only transport symmetric has them. A race does not show in every pass;
docs/symmetric.md has the rates that were measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

from torch import Tensor

from distbench.case.injection import Injection
from distbench.case.stages import Arm, Stage
from distbench.faults.base import Fault, Scene
from distbench.faults.options import one_of, real
from distbench.transport.base import Dispatched, TransportAround

if TYPE_CHECKING:
    from distbench.transport.symmetric.transport import SymmetricTransport

_TRANSPORT = "symmetric"


class _Kernels:
    """The kernels of a fault's transport: each call imitates what `flaw` names, while the fault is active."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    @property
    def transport(self) -> SymmetricTransport:
        """The transport, whose next call it changes."""
        made = self._fault.scene.transport
        while isinstance(made, TransportAround):
            made = made._inner  # noqa: SLF001 - a plugin may have other uses for a public name
        return cast("SymmetricTransport", made)

    def begin(self, stage: str, where: str, flaw: str) -> None:
        """Imitate `flaw` from now on, if `stage` is the one in which it happens."""
        if stage == where:
            self._fault.hits += 1
            self.transport.flaw = flaw

    def end(self) -> None:
        """Imitate nothing."""
        self.transport.flaw = ""


class StaleSlot(Fault):
    """Every fourth token's row takes a slot on each rank, and its payload is not written there."""

    name, stage = "stale-slot", Stage.DISPATCH
    transport = _TRANSPORT
    bug = "mori 80, 484's class: a slot is counted as received and holds an earlier call's row"
    needs = "tokens on its rank that go to two ranks"

    def __init__(self, scene: Scene, injection: Injection) -> None:
        super().__init__(scene, injection)
        self._kernels = _Kernels(self)

    def enter(self, stage: str) -> None:
        """Leave out the writes of this call."""
        self._kernels.begin(stage, Stage.DISPATCH, "stale slot")

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Write the following calls."""
        self._kernels.end()
        return dispatched


class CountNotZeroed(Fault):
    """Two slots of an earlier call are still counted when a dispatch begins: its rows lie behind them."""

    name, stage = "count-not-zeroed", Stage.DISPATCH
    transport = _TRANSPORT
    bug = "mori's constructor before 1.2.4, its combine's total_recv = 0: counters that a call inherits"
    needs = "a receive buffer with room for two rows more"

    def __init__(self, scene: Scene, injection: Injection) -> None:
        super().__init__(scene, injection)
        self._kernels = _Kernels(self)

    def begin(self) -> None:
        """Leave a count, while no rank dispatches."""
        self.hits += 1
        self._kernels.transport.leave_count(2)


class ReleaseBeforeData(Fault):
    """The rank signals that its rows are written, and writes their payload `ms` later."""

    name, stage = "release-before-data", Stage.DISPATCH
    transport = _TRANSPORT
    bug = "mori #522's class: a signal is visible before the stores that it stands for"
    options = {"ms": real(50.0, 0.0, 60_000.0)}
    needs = "tokens on its rank that go to two ranks"

    def __init__(self, scene: Scene, injection: Injection) -> None:
        super().__init__(scene, injection)
        self._kernels = _Kernels(self)

    def enter(self, stage: str) -> None:
        """Leave the payload out of this call."""
        self._kernels.begin(stage, Stage.DISPATCH, "no payload")

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Write it, late."""
        self._kernels.end()
        time.sleep(self.chosen["ms"] / 1000)
        self._kernels.transport.write_late("payload")
        return dispatched


class SignalLost(Fault):
    """The rank never signals that it has come to the end of dispatch, or to the middle of combine."""

    name, stage, verdict, arm = "signal-lost", Stage.DISPATCH, "HANG", Arm.TRUNCATED
    transport = _TRANSPORT
    bug = "mori #494, 101: a rank waits for a signal that does not come, without a time limit"
    options = {"stage": one_of(Stage.DISPATCH, Stage.COMBINE)}
    needs = "a limit, for arm truncated"
    shape = {"stage_timeouts": "dispatch=1.5,combine=1.5", "policy": "unchecked"}

    def __init__(self, scene: Scene, injection: Injection) -> None:
        super().__init__(scene, injection)
        self._kernels = _Kernels(self)

    def enter(self, stage: str) -> None:
        """Leave out the signal of this call."""
        self._kernels.begin(stage, self.chosen["stage"], "no signal")

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Signal in combine."""
        self._kernels.end()
        return dispatched

    def combined(self, tokens: Tensor) -> Tensor:
        """Signal in the following calls."""
        self._kernels.end()
        return tokens


class WaitLeftOut(Fault):
    """The rank does not wait for the others at the end of dispatch, or in the middle of combine: a race."""

    name, stage = "wait-left-out", Stage.DISPATCH
    transport = _TRANSPORT
    bug = "mori 93, 494's class: a barrier is left out, and rows are read that are not there yet"
    options = {"stage": one_of(Stage.DISPATCH, Stage.COMBINE)}
    race = True

    def __init__(self, scene: Scene, injection: Injection) -> None:
        super().__init__(scene, injection)
        self._kernels = _Kernels(self)

    def enter(self, stage: str) -> None:
        """Leave out the wait of this call."""
        self._kernels.begin(stage, self.chosen["stage"], "no wait")

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Wait in combine."""
        self._kernels.end()
        return dispatched

    def combined(self, tokens: Tensor) -> Tensor:
        """Wait in the following calls."""
        self._kernels.end()
        return tokens


class EarlyReuse(Fault):
    """The rank begins its next dispatch while its peers still read the rows of this one: a race."""

    name, stage = "early-reuse", Stage.DISPATCH
    transport = _TRANSPORT
    bug = "mori 80, 484: a rank that is a call ahead overwrites rows that a slow one has not read"
    needs = "tokens on its rank that go to other ranks"
    race = True

    def __init__(self, scene: Scene, injection: Injection) -> None:
        super().__init__(scene, injection)
        self._kernels = _Kernels(self)

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Write rows of zeros into the first slots of the peers."""
        self.hits += 1
        self._kernels.transport.write_late("reuse")
        return dispatched


class FenceLeftOut(Fault):
    """Counters and signals order no other memory accesses, in both calls: a race."""

    name, stage = "fence-left-out", Stage.DISPATCH
    transport = _TRANSPORT
    bug = "mori #522: store visibility before dispatch's grid barrier"
    race = True

    def __init__(self, scene: Scene, injection: Injection) -> None:
        super().__init__(scene, injection)
        self._kernels = _Kernels(self)

    def enter(self, stage: str) -> None:
        """Order nothing in this call."""
        self._kernels.begin(stage, stage, "fence")

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Order the following calls."""
        self._kernels.end()
        return dispatched

    def combined(self, tokens: Tensor) -> Tensor:
        """Order the following calls."""
        self._kernels.end()
        return tokens
