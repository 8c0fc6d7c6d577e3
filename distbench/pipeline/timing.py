"""Timed iterations of an arm on one rank (docs/timing.md): aligned starts, the slowest rank, raw samples, a check."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case.spec import Case
from distbench.case.stages import LAYER_STAGES, Stage
from distbench.distributed.session import Session
from distbench.distributed.waits import collective, waiting
from distbench.utils.devices import DeviceState, device_state
from distbench.utils.stats import median_error
from distbench.verify.records import ArmError, Timed
from distbench.verify.row_compare import compare_rows, relative_error

LAYER = "layer"

_CHUNK = 20
_LEAST = 20
_CPU_CACHE_BYTES = 64 << 20
_FLUSHED_L2S = 4
_ROCM_FLUSHED_BYTES = 1 << 30

Layer = Callable[[Callable[[Stage], None]], Tensor]
Measure = Callable[[Tensor], ArmError | None]


class _Laps(Protocol):
    """Timestamps of the stages' starts in one iteration, and of the last one's end."""

    def mark(self, stage: str) -> None:
        """Record the time at which `stage` begins; an empty stage is the end."""

    def microseconds(self) -> list[float]:
        """Times of each of LAYER_STAGES, and of all of them together."""


class HostLaps:
    """Timestamps of the host's monotonic clock; the work is complete when a call returns."""

    def __init__(self) -> None:
        self._moments: list[int] = []

    def mark(self, _: str) -> None:
        """See `_Laps.mark`."""
        self._moments.append(time.perf_counter_ns())

    def microseconds(self) -> list[float]:
        """See `_Laps.microseconds`."""
        ends = self._moments
        laps = [(ends[index + 1] - ends[index]) / 1000 for index in range(len(LAYER_STAGES))]
        return [*laps, (ends[-1] - ends[0]) / 1000]


class EventLaps:
    """Timestamps of the device, by events between the stages' kernels."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def mark(self, _: str) -> None:
        """See `_Laps.mark`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def microseconds(self) -> list[float]:
        """See `_Laps.microseconds`; waits for the last event."""
        events = self._events
        with waiting("this rank's device"):
            events[-1].synchronize()
        laps = [events[index].elapsed_time(events[index + 1]) * 1000 for index in range(len(LAYER_STAGES))]
        return [*laps, events[0].elapsed_time(events[-1]) * 1000]


class Timer:
    """Times the arms of one case, one after another."""

    def __init__(self, session: Session, case: Case) -> None:
        self._session = session
        self._case = case
        self._on_device = session.device.type != "cpu"
        self._cold = flushing_memory(session.device) if case.flush_l2 else None
        self._aligner = torch.zeros(1, device=session.device)

    def time(self, layer: Layer, checked: Tensor, measure: Measure | None = None) -> Timed:
        """Time `layer`, one pass of an arm, and compare its last output with `checked`, that of the checked pass.

        `measure` returns the error of the last output.

        Collective: after each chunk of iterations all ranks know the slowest rank's times, and stop at the same one.
        """
        case = self._case
        for _ in range(case.warmup):
            self._session.heartbeat.mark(Stage.TIMING)
            layer(_ignore)
        if self._on_device:
            torch.cuda.reset_peak_memory_stats()
        mine: list[list[float]] = []
        slowest: list[list[float]] = []
        output = checked
        while len(mine) < case.iterations and not self._settled(slowest):
            chunk = []
            for _ in range(min(_CHUNK, case.iterations - len(mine))):
                output, laps = self._iterate(layer)
                chunk.append(laps)
            table = torch.tensor([laps.microseconds() for laps in chunk], dtype=torch.float64)
            mine += table.tolist()
            with collective("all_reduce"):
                dist.all_reduce(table, op=dist.ReduceOp.MAX, group=self._session.group)
            slowest += table.tolist()
        return Timed(
            slowest_us={
                stage: [round(row[index], 2) for row in slowest] for index, stage in enumerate((*LAYER_STAGES, LAYER))
            },
            layer_us=[round(row[-1], 2) for row in mine],
            last=compare_rows(output, checked),
            drift=relative_error(output, checked),
            flushed_bytes=0 if self._cold is None else self._cold.nbytes,
            peak_device_bytes=torch.cuda.max_memory_allocated() if self._on_device else None,
            error=None if measure is None else measure(output),
        )

    def state_while(self, layer: Layer) -> DeviceState:
        """State of this rank's device while `layer` runs, untimed: an idle device would not show it.

        Collective: all ranks keep running until the last one's device has answered.
        """
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(device_state, self._session.device.index)
            while self._session.on_any_rank(value=not asked.done()):
                for _ in range(_CHUNK):
                    self._session.heartbeat.mark(Stage.TIMING)
                    layer(_ignore)
            return asked.result()

    def _iterate(self, layer: Layer) -> tuple[Tensor, _Laps]:
        self._session.heartbeat.mark(Stage.TIMING)
        if self._cold is not None:
            self._cold.zero_()
        if self._case.align == "barrier":
            with collective("all_reduce", self._aligner.get_device()):
                dist.all_reduce(self._aligner, group=self._session.group)
        laps: _Laps = EventLaps() if self._on_device else HostLaps()
        output = layer(laps.mark)
        laps.mark("")
        return output, laps

    def _settled(self, slowest: list[list[float]]) -> bool:
        if not self._case.median_error or len(slowest) < _LEAST:
            return False
        error = median_error([row[-1] for row in slowest])
        return error is not None and error <= self._case.median_error


def flushing_memory(device: torch.device) -> Tensor:
    """Memory several times the size of the last-level cache: writing all of it evicts everything else.

    ROCm reports the cache of one die only: an MI300X has 4 MiB on each of eight, and 256 MiB behind them.
    """
    size = _CPU_CACHE_BYTES
    if device.type != "cpu":
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or size
    written = size * _FLUSHED_L2S
    if device.type != "cpu" and torch.version.hip:
        written = max(written, _ROCM_FLUSHED_BYTES)
    return torch.empty(written, dtype=torch.uint8, device=device)


def _ignore(_: str) -> None:
    """Record nothing."""
