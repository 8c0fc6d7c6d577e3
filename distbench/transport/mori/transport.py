"""MoRI's dispatch and combine: the package `mori`, or with `emulate` its stand-in `distbench.transport.mori.emulated`.

MoRI checks almost none of its arguments; those that it would get wrong are refused here (docs/mori.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.distributed.session import Session
from distbench.distributed.waits import collective, waiting
from distbench.errors import DistbenchError, Unsupported
from distbench.transport.base import Dispatched, Transport, TransportContext, poison_, refuse_turn
from distbench.transport.mori.checks import (
    check_batch,
    check_device,
    check_dropped,
    check_routing_is_own,
    compute_units_of,
    excess_blocks,
)
from distbench.transport.mori.config import (
    Launch,
    MoriPlan,
    check_environment,
    heap_size,
    lost_chunks,
    plan_mori,
    sum_order,
)
from distbench.transport.mori.world import join_world
from distbench.utils.amd_arch import arch_of
from distbench.utils.text import one_line
from distbench.workload.batch import TokenBatch
from distbench.workload.quantize import fp8_dtype

Phase = Literal[Stage.DISPATCH, Stage.COMBINE]


class _Known(NamedTuple):
    """A checked batch, a copy of its ids, and the number of rows that this rank receives, own and others'."""

    batch: TokenBatch
    routing: Tensor
    received: int


class _Sent(NamedTuple):
    """A dispatch that was begun: its batch, what is known of it, and MoRI's five outputs; None until its one call."""

    batch: TokenBatch
    known: _Known | None
    outputs: tuple[Any, ...] | None


class _Returning(NamedTuple):
    """A combine that was begun: its rows, the rank's routing, and MoRI's tokens; None until its one call."""

    rows: Tensor
    routing: Tensor
    combined: Tensor | None


class MoriTransport(Transport):
    """One MoRI operator: see `Transport` for the contract. Construction is collective over the session's group.

    The halves are those of SGLang's dispatcher (`dispatch_a`, `dispatch_b`, `combine_a`, `combine_b` of `moriep.py`):
    with AsyncLL, its low-latency mode, MoRI's own; any other kernel runs whole in the receive half.

    Waits for a device happen once per routing: tensors passed again count as unchanged, and must not be written to
    meanwhile.
    """

    def __init__(self, session: Session, case: Case) -> None:
        """Join MoRI's shmem world, create the operator, and wait until every rank has created its own.

        Raises:
            Unsupported: the package is missing, is too old for the case, or finds no usable device; see `join_world`.
            InvalidCase: see `plan_mori` and `heap_size`; or nodes with different numbers of ranks.
        """
        session.require_same(session.local_ranks, "number of ranks on their nodes", "start as many on each node")
        self.capacity = case.capacity
        self._case = case
        self._device = session.device
        self._group = session.group
        self._rank = session.rank
        with session.together():
            check_environment(os.environ)
            mori = _package(case, session.device)
            units = None if session.device.type == "cpu" else compute_units_of(session.device)
            self._plan = plan_mori(case, os.environ, session.local_ranks, units=units)
            check_dropped(case, self._plan)
            heap_bytes = heap_size(self._plan, os.environ, emulated=case.emulate)
            if not case.emulate:
                check_device(case, self._plan, session.device)
            config = _configuration(mori, case, self._plan, session.rank)
        heap = join_world(mori, session, heap_bytes)
        os.environ["MORI_EP_LAUNCH_CONFIG_MODE"] = case.launch_mode
        self._op = _operator(mori, config, session.group)
        self._wait_for_all()
        self._total_recv = torch.zeros(1, dtype=torch.int32, device=session.device)
        self._known: _Known | None = None
        self._under_way = False
        self.sends_early = self._has_halves
        self._sent: _Sent | None = None
        self._returning: _Returning | None = None
        self._received: Dispatched | None = None
        self._combined: Tensor | None = None
        self.sum_order = sum_order(self._plan.kernel, self._plan.gpu_per_node, self._plan.quant)
        self.facts = _facts(mori, self._plan, heap)

    def dispatch_send(self, batch: TokenBatch) -> None:
        """See `Transport.dispatch_send`.

        Raises:
            DistbenchError: a tensor that MoRI would misread.
        """
        known = self._known if self._is_known(batch) else None
        if known is None:
            check_batch(batch, self._case, self._plan, self._device)
        outputs = self._dispatch(self._op.dispatch_send, batch) if self._has_halves else None
        self._sent = _Sent(batch, known, outputs)

    def dispatch_recv(self) -> Dispatched:
        """See `Transport.dispatch_recv`.

        Raises:
            DistbenchError: more received rows than the receive buffer holds; or no dispatch was begun.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            refuse_turn("dispatch_recv")
        batch, known, outputs = sent
        if outputs is None:
            outputs = self._dispatch(self._op.dispatch, batch)
        else:
            with collective("dispatch of mori", batch.ids.get_device()):
                self._op.dispatch_recv()
        hidden, weights, scales, ids, counter = outputs
        self._total_recv.copy_(counter)  # combine sets the counter to zero
        # Kernels keep the addresses of their arguments until combine is done.
        on_device = self._device.type == "cuda"
        if known is not None and on_device and torch.cuda.is_current_stream_capturing():
            known = known._replace(routing=batch.ids.clone())  # of each replay's ids
        self._known = known or _Known(batch, batch.ids.clone(), self._count())
        self._under_way = True
        self._received = Dispatched(hidden, scales, weights, ids, self._total_recv)
        if known is None:  # poisoned until other tokens are dispatched; no peer writes before combine
            _poison_rows(self._received, slice(self._known.received, None))
        return self._received

    def sources(self) -> Tensor:
        """See `Transport.sources`."""
        if not self._under_way:
            refuse_turn("sources")
        stride = self._case.ep_size * self._case.max_dispatch_tokens_per_rank
        flat = self._op.get_dispatch_src_token_pos().to(self._device).long()
        return torch.stack([flat.div(stride, rounding_mode="floor"), flat % stride], dim=1)

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """See `Transport.combine_send`; a row past the end of `expert_out` is sent as poison.

        Raises:
            DistbenchError: without a dispatch, or `ids` are not those that were dispatched.
        """
        known = self._take_known(ids)
        rows = _whole(expert_out, known.received)
        if not self._plan.external:
            buffer = self._op.get_registered_combine_input_buffer(rows.dtype, rows.shape[1])
            buffer[: known.received].copy_(rows[: known.received])
            rows = buffer
        combined = self._combine(self._op.combine_send, rows, known.routing) if self._has_halves else None
        self._returning = _Returning(rows, known.routing, combined)

    def combine_recv(self) -> Tensor:
        """See `Transport.combine_recv`.

        Raises:
            DistbenchError: no combine was begun.
        """
        back, self._returning = self._returning, None
        if back is None:
            refuse_turn("combine_recv")
        combined = back.combined
        if combined is None:
            combined = self._combine(self._op.combine, back.rows, back.routing)
        else:
            with collective("combine of mori", back.rows.get_device()):
                self._op.combine_recv()
        self._combined = combined
        result: Tensor = combined[: back.routing.shape[0]].clone()
        return result

    def forget(self) -> None:
        """See `Transport.forget`; peers read these buffers in combine and write them in dispatch, so all ranks wait.

        The contents of the package's other memory are unknown.
        """
        if self._known is None or self._received is None or self._combined is None:
            return
        tokens, received = len(self._known.routing), self._known.received
        self._wait_for_all()
        poison_(self._combined[:tokens])
        _poison_rows(self._received, slice(received))
        if not self._case.combine_quant.endswith("_blockwise"):  # its rows have a different width there
            columns = self._case.hidden_size
            pushed = self._op.get_registered_combine_input_buffer(self._combined.dtype, columns)
            poison_(pushed.view(self._case.ep_size, -1, columns)[:, :tokens])
        self._wait_for_all()

    def close(self) -> None:
        """See `Transport.close`: release the operator, once no peer can be reading from it. Collective."""
        self._wait_for_all()
        self._received = self._combined = None
        del self._op

    @property
    def _has_halves(self) -> bool:
        return self._plan.kernel == "AsyncLL"

    def _dispatch(self, call: Callable[..., tuple[Any, ...]], batch: TokenBatch) -> tuple[Any, ...]:
        """Call MoRI's dispatch, or its send half."""
        with collective("dispatch of mori", batch.ids.get_device()):
            outputs = call(batch.hidden, batch.weights, batch.scales, batch.ids, **self._geometry())
            self._note_launch(Stage.DISPATCH)
        return outputs

    def _combine(self, call: Callable[..., tuple[Any, ...]], rows: Tensor, routing: Tensor) -> Tensor:
        """Call MoRI's combine, or its send half."""
        with collective("combine of mori", rows.get_device()):
            combined: Tensor = call(rows, None, routing, **self._geometry())[0]
            self._note_launch(Stage.COMBINE)
        return combined

    def _geometry(self) -> dict[str, Any]:
        """Return the geometry of a call; send halves take no rdma_block_num, which is then the configuration's."""
        if self._plan.launch_mode == "AUTO":
            return {}
        named = _named(self._plan.launch, "warp_per_block")
        if self._has_halves:
            del named["rdma_block_num"]
        return named

    def _is_known(self, batch: TokenBatch) -> bool:
        """Whether this batch was dispatched last; comparing ids on a device would wait for it."""
        known = self._known
        if known is None or any(given is not held for given, held in zip(batch, known.batch, strict=True)):
            return False
        return self._device.type != "cpu" or torch.equal(batch.ids, known.routing)

    def _count(self) -> int:
        received = int(self._total_recv)
        if received > self.capacity:
            message = (
                f"dispatch: rank {self._rank} received {received} rows, its buffer has {self.capacity}; what lies "
                "behind it was overwritten; raise prealloc_max_recv_tokens or max_dispatch_tokens_per_rank"
            )
            raise DistbenchError(message)
        return received

    def _take_known(self, ids: Tensor) -> _Known:
        known = self._known
        if known is None or not self._under_way or self._sent is not None:
            refuse_turn("combine")
        self._under_way = False
        if ids is not known.batch.ids or self._device.type == "cpu":
            check_routing_is_own(ids, known.routing)
        return known

    def _note_launch(self, phase: Phase) -> None:
        """Report the geometry that MoRI chose, where the release shows it.

        Raises:
            DistbenchError: under AUTO it chose more blocks than can run at once, which would hang; or RDMA blocks
                with which the release loses rows.
        """
        taken = getattr(self._op, f"_cached_{phase}_launch", None)
        launch = None if taken is None else _named(Launch(*taken))
        if launch is None or launch == self.facts[f"{phase}_launch"]:
            return
        wrong = "" if self._case.emulate else excess_blocks(launch["block_num"], self._device)
        if phase == Stage.DISPATCH:
            wrong = wrong or lost_chunks(self._plan.kernel, launch["rdma_block_num"], self.facts["mori"])
        if wrong:
            message = f"{phase}: {wrong}; launch_mode = {self._plan.launch_mode} took them: use MANUAL"
            raise DistbenchError(message)
        self.facts[f"{phase}_launch"] = launch

    def _wait_for_all(self) -> None:
        """Wait until this rank's device is idle, and then for the other ranks.

        Releases before 1.2.4 do not wait after they zero their buffers, and a fast peer's first signal is lost.
        """
        if self._device.type == "cuda":
            with waiting("this rank's device"):
                torch.cuda.synchronize(self._device)
        with collective("barrier", -1 if self._device.index is None else self._device.index):
            dist.barrier(group=self._group)


def _poison_rows(dispatched: Dispatched, rows: slice) -> None:
    """Overwrite rows of the receive buffer: MoRI leaves valid ids past the received rows, which hide a stray read."""
    for part in dispatched.fields():
        poison_(part[rows])


def _whole(expert_out: Tensor, received: int) -> Tensor:
    """Return at least `received` contiguous rows: combine reads that many, whatever the tensor holds."""
    if expert_out.shape[0] >= received:
        return expert_out.contiguous()
    missing = expert_out.new_empty(received - expert_out.shape[0], expert_out.shape[1])
    poison_(missing)
    return torch.cat([expert_out, missing])


def _package(case: Case, device: torch.device) -> Any:
    if case.emulate:
        from distbench.transport.mori import emulated as stand_in  # noqa: PLC0415 - loaded on demand

        stand_in.assume(case.mori_habits, arch_of(case.cu_count))
        return stand_in
    try:
        import mori
        import mori.ops
        import mori.shmem
    except ImportError as error:
        message = f"transport mori: {error}; install amd-mori on a ROCm machine (docs/mori.md), or add --emulate"
        raise Unsupported(message) from error
    if device.type != "cuda":
        message = f"transport mori: the ranks compute on {device}, MoRI on GPUs; use --device cuda, or add --emulate"
        raise Unsupported(message)
    with contextlib.suppress(ImportError):  # which a release may lack: see `join_world`
        import mori.ops._jit_loader
    return mori


def _configuration(mori: Any, case: Case, plan: MoriPlan, rank: int) -> Any:
    """Return the package's configuration; a key that it does not know is refused, never dropped."""
    kernels = mori.ops.EpDispatchCombineKernelType
    if not hasattr(kernels, plan.kernel):
        message = f"mori_kernel = {plan.kernel}: the installed mori has none; install amd-mori 1.2.4 or choose another"
        raise Unsupported(message)
    values = plan.values(case, rank)
    known = {field.name for field in dataclasses.fields(mori.ops.EpDispatchCombineConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        message = f"the installed mori's configuration has no {', '.join(unknown)}; install amd-mori 1.2.4"
        raise Unsupported(message)
    dtype = fp8_dtype(case.fp8_format) if case.dispatch_dtype == "fp8" else torch.bfloat16
    return mori.ops.EpDispatchCombineConfig(data_type=dtype, kernel_type=getattr(kernels, plan.kernel), **values)


def _operator(mori: Any, config: Any, group: dist.ProcessGroup) -> Any:
    """Return the package's operator. Collective.

    Raises:
        Unsupported: the release does not support the quantisation, kernel or size, or not on this device; or refuses
            a variable.
    """
    try:
        with _barriers_within(group), collective("construction of mori"):
            return mori.ops.EpDispatchCombineOp(config)
    except (ValueError, RuntimeError) as error:
        # Its C++ refuses variables by a RuntimeError that begins with a name; other RuntimeErrors are faults.
        if not isinstance(error, ValueError | NotImplementedError) and not str(error).startswith("MORI_"):
            raise
        message = f"the installed mori cannot run the case: {one_line(error)}"
        raise Unsupported(message) from error


@contextlib.contextmanager
def _barriers_within(group: dist.ProcessGroup) -> Iterator[None]:
    """Make MoRI's constructor wait for `group`, not for the whole job, which has ranks outside this case."""
    barrier = dist.barrier
    dist.barrier = partial(barrier, group=group)
    try:
        yield
    finally:
        dist.barrier = barrier


def _facts(mori: Any, plan: MoriPlan, heap_bytes: int) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(plan)
    del plain["launch"]
    asked = _named(plan.launch)
    if plan.launch_mode == "AUTO":
        asked = dict.fromkeys(asked)
    taken = {"dispatch_launch": None, "combine_launch": None}
    version = str(getattr(mori, "__version__", "unknown"))
    return {"mori": version, **plain, **asked, **taken, "heap_size": heap_bytes}


def _named(launch: Launch, warps: str = "warp_num_per_block") -> dict[str, Any]:
    """Return a geometry under MoRI's names: `warps` has one in its configuration, and another in its calls."""
    return dict(zip(("block_num", "rdma_block_num", warps), launch, strict=True))


def make(context: TransportContext) -> MoriTransport:
    """Return the transport of a rank; see `MoriTransport.__init__`."""
    return MoriTransport(context.session, context.case)


PLUGIN = Plugin(make=make, name="mori", graphs=True, two_batch_overlap=True)
