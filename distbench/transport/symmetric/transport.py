"""Dispatch and combine by one kernel each, over memory that the ranks map from each other.

As MoRI's IntraNode kernel: a rank takes a slot of a peer's receive buffer by an atomic, writes the row there, and both
calls end in a barrier of the devices. No count is exchanged, and the host reads nothing, so calls can be captured.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.case.stages import Stage
from distbench.case.timeouts import patience
from distbench.distributed.waits import collective, missed, waiting
from distbench.errors import DistbenchError
from distbench.transport.base import Dispatched, Transport, TransportContext, poison_, refuse_turn
from distbench.transport.collective.route import words
from distbench.transport.symmetric.memory import check_mappable, map_memory
from distbench.transport.symmetric.plan import CONTROL_WORDS, plan_memory
from distbench.utils.devices import interpreted
from distbench.utils.triton_launch import launch
from distbench.workload.batch import TokenBatch

_COUNT, _TOTAL, _LOST, _STUCK = 0, 1, 2, 6  # control words, see peer_kernels.py
_BLOCK_WORDS = 2048
_ROW_COLUMNS, _PART_COLUMNS = 8192, 1024
_DISPATCH_WARPS, _COMBINE_WARPS = 8, 16
# Programs that write rows, of which a processor runs several; one program a processor pulls them back.
_WRITERS_PER_PROCESSOR = 4
# Ticks in a second: milliseconds of NVIDIA's clock, elsewhere about as many polls as a kernel makes at most.
_TICKS_PER_S = {"clock": 1_000, "polls": 1_000_000, "interpreted": 100}
_MOST_TICKS = (1 << 31) - 1
"""An int32 in all launches: see `utils/triton_launch.py`."""
_FOR_EVER_S = 86_400.0
# Share of a time limit after which a kernel gives up waiting, so that the rank that it waits for is known by then.
_PATIENCE = 0.75


class _Batch(NamedTuple):
    """A batch; hidden as words, scales or else weights, weights and ids; and the slots of its rows on each rank."""

    given: TokenBatch
    fields: tuple[Tensor, ...]
    places: Tensor


class SymmetricTransport(Transport):
    """See `Transport` for the contract; construction is collective over the case's group, and maps the memory.

    Rows lie in the order in which atomics gave them slots, whatever the case's slot_order. The sum is that of MoRI's
    IntraNode kernel, bit for bit. Neither call reads from the device. A row that finds no slot is not written, comes
    back as NaN, and `sources` refuses the call.
    """

    def __init__(self, context: TransportContext) -> None:
        """Map memory for the case's rows.

        Raises:
            Unsupported: see `check_mappable` and `map_memory`.
        """
        case, session, like = context.case, context.session, context.like
        devices = session.everyones(torch.tensor([-1 if session.device.index is None else session.device.index]))
        with session.together():
            check_mappable(session, devices.flatten().tolist())
        self.capacity = case.capacity
        self.flaw = ""
        """Fault of the kernels that the next call imitates; see `faults/symmetric.py`."""
        self._session, self._rank = session, context.rank
        self._ranks, self._experts, self._stride = (
            case.ep_size,
            case.experts_per_rank,
            case.max_dispatch_tokens_per_rank,
        )
        self._columns, self._topk = case.hidden_size, case.topk_slots
        self._plan = plan_memory(case.capacity, like, torch.bfloat16.itemsize)
        self._mapped = map_memory(session, self._plan.size)
        self._control = self._region(0, CONTROL_WORDS * 4).view(torch.int32)
        self._received, self._sources = self._buffers(like)
        self._returns = self._rows(self._plan.returns, self._columns, torch.bfloat16)
        self._has_clock = session.device.type == "cuda" and torch.version.hip is None
        self._limits = {
            stage: self._ticks(_PATIENCE * patience(case, stage)) for stage in (Stage.DISPATCH, Stage.COMBINE)
        }
        self._constants: dict[str, Any] = {
            "RANK": self._rank,
            "RANKS": self._ranks,
            "LANES": _whole(self._ranks),
            "CLOCK": int(self._has_clock),
        }
        self._processors = 1 if interpreted() else max(_processors(session.device) // session.ranks_per_device, 1)
        self._batch: _Batch | None = None
        self._captured: list[_Batch] = []  # whose memory graphs use
        self._under_way = False
        self._arm = ""
        self._returning: tuple[Tensor, Tensor] | None = None
        fields = self._received.fields()
        self.facts = {
            "kernel": "symmetric_memory",
            "rows": "interpreted" if interpreted() else "triton",
            "row_bytes": sum(part.shape[1] * part.element_size() for part in (*fields, self._sources.unsqueeze(1))),
            "bytes": self._plan.size,
            "devices": "shared" if session.shares_devices else "own",
        }
        self.forget()
        if not interpreted():
            self._warm_up(like)

    def dispatch_send(self, batch: TokenBatch) -> None:
        """See `Transport.dispatch_send`; the kernel also waits for the rows of all ranks."""
        known = self._batch
        if known is None or any(one is not two for one, two in zip(batch, known.given, strict=True)):
            known = self._batch = self._prepared(batch)
        self._arm = self._session.heartbeat.arm
        if self._session.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(known)
        with collective("dispatch of symmetric", batch.ids.get_device()):
            self._launch_dispatch(known, self.flaw)
        self._under_way = True

    def dispatch_recv(self) -> Dispatched:
        """See `Transport.dispatch_recv`.

        Raises:
            DistbenchError: no dispatch was begun.
        """
        if not self._under_way:
            refuse_turn("dispatch_recv")
        return self._received

    def write_late(self, flaw: str) -> None:
        """Write this rank's payload once more, outside of any call: "payload" where it belongs, "reuse" as zeros."""
        assert self._batch is not None  # noqa: S101 - after a dispatch
        self._launch_dispatch(self._batch, flaw)

    def leave_count(self, rows: int) -> None:
        """Count slots as taken that no call has taken, before any rank dispatches: a fault."""
        self._control[_COUNT] = rows

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """See `Transport.combine_send`; rows move in the receive half.

        Raises:
            DistbenchError: without a dispatch, or `ids` are not as many as were dispatched.
        """
        if not self._under_way or self._batch is None:
            refuse_turn("combine")
        if ids.shape[0] != self._batch.places.shape[0]:
            message = (
                f"combine: ids have {ids.shape[0]} rows, this rank dispatched {self._batch.places.shape[0]} tokens; "
                "pass the rank's own routing, not the ids that dispatch returned"
            )
            raise DistbenchError(message)
        self._under_way = False
        self._returning = expert_out, ids

    def combine_recv(self) -> Tensor:
        """See `Transport.combine_recv`; a row past the end of `expert_out` is NaN.

        Raises:
            DistbenchError: no combine was begun.
        """
        from distbench.transport.symmetric import peer_kernels  # noqa: PLC0415 - loads Triton

        back, batch, self._returning = self._returning, self._batch, None
        if back is None or batch is None:
            refuse_turn("combine_recv")
        rows, ids = back[0].contiguous(), back[1].contiguous()
        tokens = ids.shape[0]
        out = rows.new_empty(tokens, self._columns, dtype=torch.float32 if interpreted() else rows.dtype)
        whole = tokens >= self._processors
        block = min(_whole(self._columns), _ROW_COLUMNS if whole else _PART_COLUMNS)
        with collective("combine of symmetric", ids.get_device()):
            launch(
                peer_kernels.combine,
                (self._processors,),
                rows,
                ids,
                batch.places,
                out,
                self._control,
                self._mapped.addresses,
                self._limits[Stage.COMBINE],
                rows.shape[0],
                tokens,
                OFFSET=self._plan.returns,
                WIDTH=self._columns,
                BLOCK=block,
                TOPK=self._topk,
                EXPERTS=self._experts,
                **self._constants,
                FLAW=self.flaw,
                num_warps=_COMBINE_WARPS,
            )
        return out.to(rows.dtype)  # Triton's interpreter does not round as devices do

    def sources(self) -> Tensor:
        """See `Transport.sources`.

        Raises:
            DistbenchError: rows were refused, since the receive buffer was full; or no dispatch was made.
        """
        if not self._under_way:
            refuse_turn("sources")
        total, lost = self._read_control(_TOTAL, _LOST)
        if lost:
            message = (
                f"dispatch: rank {self._rank} was to receive {total + lost} rows, its buffer has {self.capacity}; "
                f"{lost} were not written; raise prealloc_max_recv_tokens or max_dispatch_tokens_per_rank"
            )
            raise DistbenchError(message)
        flat = self._sources[:total].long()
        return torch.stack([flat.div(self._stride, rounding_mode="floor"), flat % self._stride], dim=1)

    def forget(self) -> None:
        """See `Transport.forget`; peers write and read this memory, so all ranks wait before and after."""
        self._wait_for_all()
        for part in (*self._received.fields(), self._sources, self._returns):
            poison_(part)
        self._wait_for_all()

    def close(self) -> None:
        """See `Transport.close`: no peer uses this memory any more."""
        self._wait_for_all()
        del self._received, self._sources, self._returns, self._control, self._mapped

    def _warm_up(self, like: TokenBatch) -> None:
        """Compile both kernels by a call with the tokens `like`, in which ranks wait as long as compilation takes."""
        limits, self._limits = self._limits, dict.fromkeys(self._limits, _MOST_TICKS)
        self.dispatch(like)
        self.combine(self._returns, like.ids)
        self.forget()
        self._limits = limits

    def _launch_dispatch(self, batch: _Batch, flaw: str) -> None:
        from distbench.transport.symmetric import peer_kernels  # noqa: PLC0415 - loads Triton

        plan, fields = self._plan, batch.fields
        tokens = batch.places.shape[0]
        widths = tuple(part.shape[1] for part in fields)
        if batch.given.scales is None:
            widths = (widths[0], 0, *widths[2:])
        launch(
            peer_kernels.dispatch,
            (max(min(tokens, self._processors * _WRITERS_PER_PROCESSOR), 1) if self._processors > 1 else 1,),
            *fields,
            batch.places,
            self._control,
            self._mapped.addresses,
            self._limits[Stage.DISPATCH],
            tokens,
            OFFSETS=(plan.hidden, plan.scales, plan.weights, plan.ids, plan.sources),
            WIDTHS=widths,
            BLOCKS=(min(_whole(widths[0]), _BLOCK_WORDS), *(_whole(max(width, 1)) for width in widths[1:])),
            CAPACITY=self.capacity,
            STRIDE=self._stride,
            EXPERTS=self._experts,
            **self._constants,
            FLAW=flaw,
            num_warps=_DISPATCH_WARPS,
        )

    def _prepared(self, batch: TokenBatch) -> _Batch:
        scales = batch.weights if batch.scales is None else batch.scales
        fields = (words(batch.hidden.contiguous()), scales, batch.weights, batch.ids)
        places = batch.ids.new_empty(batch.ids.shape[0], self._ranks)
        return _Batch(batch, tuple(part.contiguous() for part in fields), places)

    def _region(self, start: int, size: int) -> Tensor:
        return self._mapped.mine[start : start + size]

    def _rows(self, start: int, columns: int, dtype: torch.dtype) -> Tensor:
        size = self.capacity * columns * dtype.itemsize
        return self._region(start, size).view(dtype).view(self.capacity, columns)

    def _buffers(self, like: TokenBatch) -> tuple[Dispatched, Tensor]:
        """Views of the receive buffer, and of the source of each row."""
        plan = self._plan

        def rows(start: int, field: Tensor) -> Tensor:
            return self._rows(start, field.shape[1], field.dtype)

        received = Dispatched(
            hidden=rows(plan.hidden, like.hidden),
            scales=None if like.scales is None else rows(plan.scales, like.scales),
            weights=rows(plan.weights, like.weights),
            ids=rows(plan.ids, like.ids),
            total_recv=self._control[_TOTAL : _TOTAL + 1],
        )
        return received, self._rows(plan.sources, 1, torch.int32).view(-1)

    def _ticks(self, seconds: float) -> int:
        unit = "interpreted" if interpreted() else "clock" if self._has_clock else "polls"
        return min(round(seconds * _TICKS_PER_S[unit]), _MOST_TICKS)

    def _read_control(self, *numbers: int) -> list[int]:
        """Return control words, once the device is idle; stand still where it has given up waiting for a rank."""
        found: list[int] = self._control[: _STUCK + 1].tolist()
        if found[_STUCK]:
            self._stand_still(Stage.DISPATCH if found[_STUCK] > 0 else Stage.COMBINE, abs(found[_STUCK]) - 1)
        return [found[number] for number in numbers]

    def _stand_still(self, stage: Stage, rank: int) -> None:
        """Tell the supervisor which rank did not arrive, and wait to be ended: nothing that follows can be right."""
        self._session.heartbeat.arm = self._arm
        self._session.heartbeat.mark(stage)
        missed(rank)
        with waiting("signal of a peer"):
            time.sleep(_FOR_EVER_S)

    def _wait_for_all(self) -> None:
        if self._session.device.type == "cuda":
            with waiting("this rank's device"):
                torch.cuda.synchronize(self._session.device)
        self._read_control()
        with collective("barrier"):
            dist.barrier(group=self._session.group)


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _whole(width: int) -> int:
    """Return the smallest power of two that holds `width` columns."""
    return 1 << (width - 1).bit_length()


PLUGIN = Plugin(make=SymmetricTransport, name="symmetric", graphs=True, two_batch_overlap=True)
