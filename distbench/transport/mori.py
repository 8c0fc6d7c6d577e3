"""MoRI's dispatch and combine: the package `mori`, or with `emulate` its stand-in `distbench.emulation.mori`.

MoRI checks next to nothing of what it is given; what it would get wrong is refused here (docs/mori.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, NoReturn

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case import Case
from distbench.errors import DistbenchError, Unsupported
from distbench.session import Session
from distbench.transport.base import Dispatched, poison_
from distbench.transport.mori_config import (
    HEAP_SIZE,
    INTRA,
    SHMEM_MODE,
    SKIPS_NEGATIVE,
    MoriPlan,
    check_environment,
    heap_size,
    plan_mori,
)
from distbench.workload.batch import TokenBatch

_UNIQUE_ID_BYTES = 128


class _World(NamedTuple):
    """The one shmem world of a process: the ranks it was made for and the bytes of its heap."""

    mori: Any
    group: dist.ProcessGroup
    heap_bytes: int


_worlds: list[_World] = []


class MoriTransport:
    """One MoRI operator: see `Transport` for the contract. Construction is collective over the session's group."""

    def __init__(self, session: Session, case: Case) -> None:
        """Join MoRI's shmem world, make the operator, and wait until every rank has made its own.

        Raises:
            Unsupported: the package is not there, is too old for the case, or finds no accelerator.
            InvalidCase: see `plan_mori` and `heap_size`.

        """
        check_environment(os.environ)
        session.require_same(session.local_ranks, "number of ranks on their nodes", "start as many on each node")
        self.capacity = case.capacity
        self._case = case
        self._plan = plan_mori(case, os.environ, session.local_ranks)
        self._device = session.device
        self._group = session.group
        self._rank = session.rank
        mori = _package(case, session.device)
        _check_residency(self._plan, session.device)
        self._config = _configuration(mori, case, self._plan, session.rank)
        heap = join_world(mori, session, heap_size(self._plan, os.environ, emulated=case.emulate))
        os.environ["MORI_EP_LAUNCH_CONFIG_MODE"] = case.launch_mode
        with _barriers_within(session.group):
            self._op = mori.ops.EpDispatchCombineOp(self._config)
        self._wait_for_all()
        self._batch: TokenBatch | None = None
        self._routing: Tensor | None = None
        self._received = 0
        self.facts = _facts(mori, self._plan, heap)

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """See `Transport.dispatch`.

        Raises:
            DistbenchError: a tensor that MoRI would misread, or more rows came than the receive buffer holds.

        """
        check_batch(batch, self._case, self._plan, self._device)
        self._batch, self._routing = batch, batch.ids.clone()  # kernels keep their addresses until combine is done
        hidden, weights, scales, ids, counter = self._op.dispatch(
            batch.hidden, batch.weights, batch.scales, batch.ids, **self._geometry()
        )
        if self._plan.kernel == "AsyncLL":
            self._op.dispatch_recv()
        total_recv = counter.clone()  # combine sets the counter to zero
        self._received = int(total_recv)
        if self._received > self.capacity:
            message = (
                f"dispatch: rank {self._rank} received {self._received} rows, its buffer has {self.capacity}; what "
                "lies behind it was overwritten; raise prealloc_max_recv_tokens or max_dispatch_tokens_per_rank"
            )
            raise DistbenchError(message)
        return Dispatched(hidden, scales, weights, ids, total_recv)

    def sources(self) -> Tensor:
        """See `Transport.sources`."""
        if self._routing is None:
            message = "sources() was called with no dispatch under way; call it between dispatch and combine"
            raise DistbenchError(message)
        stride = self._case.ep_size * self._case.max_dispatch_tokens_per_rank
        flat = self._op.get_dispatch_src_token_pos().to(self._device).long()
        return torch.stack([flat.div(stride, rounding_mode="floor"), flat % stride], dim=1)

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """See `Transport.combine`; a row past the end of `expert_out` is sent as poison.

        Raises:
            DistbenchError: no dispatch is under way, or `ids` are not those that were dispatched.

        """
        routing = self._take_routing(ids)
        rows = _whole(expert_out, self._received)
        if not self._plan.external:
            buffer = self._op.get_registered_combine_input_buffer(rows.dtype, rows.shape[1])
            buffer[: self._received].copy_(rows[: self._received])
            rows = buffer
        combined, _ = self._op.combine(rows, None, routing, **self._geometry())
        if self._plan.kernel == "AsyncLL":
            self._op.combine_recv()
        result: Tensor = combined[: routing.shape[0]].clone()
        self._batch = None
        return result

    def close(self) -> None:
        """Let the operator go, once no peer can be reading from it. Collective."""
        self._wait_for_all()
        del self._op

    def _geometry(self) -> dict[str, int]:
        if self._plan.launch_mode == "AUTO":
            return {}
        launch = self._plan.launch
        return {
            "block_num": launch.blocks,
            "rdma_block_num": launch.rdma_blocks,
            "warp_per_block": launch.warps,
        }

    def _take_routing(self, ids: Tensor) -> Tensor:
        routing, self._routing = self._routing, None
        if routing is None:
            message = "combine() was called with no dispatch under way; the two strictly alternate"
            raise DistbenchError(message)
        check_routing_is_own(ids, routing)
        return routing

    def _wait_for_all(self) -> None:
        """Wait until what this rank's device has to do is done, and then for the other ranks.

        Releases before 1.2.4 leave this out after they zero their buffers, and a fast peer's first signal is lost.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        dist.barrier(group=self._group)


def join_world(mori: Any, session: Session, heap_bytes: int) -> int:
    """Join the shmem world of the session's group, or stay in it, and return the bytes of its heap. Collective.

    MoRI has one world in a process: another group, or a larger heap, ends the one before. The 128 bytes that MoRI's
    ranks find each other by are sent here, because MoRI's own way takes them from global rank 0.
    """
    if _all_are_in(mori, session, heap_bytes):
        return _worlds[0].heap_bytes
    leave_world()
    session.at_close(leave_world)
    set_here = HEAP_SIZE not in os.environ
    if set_here:
        os.environ[HEAP_SIZE] = str(heap_bytes)
    os.environ.setdefault(SHMEM_MODE, "static_heap")
    shmem = mori.shmem
    word = torch.zeros(_UNIQUE_ID_BYTES, dtype=torch.uint8, device=session.device)
    if session.rank == 0:
        word.copy_(torch.frombuffer(bytearray(shmem.shmem_get_unique_id()), dtype=torch.uint8))
    dist.broadcast(word, group=session.group, group_src=0)
    size = dist.get_world_size(session.group)
    identity = bytes(word.cpu().tolist())
    status = shmem.shmem_init_attr(shmem.MORI_SHMEM_INIT_WITH_UNIQUEID, session.rank, size, identity)
    if set_here:
        del os.environ[HEAP_SIZE]
    if status not in (0, None) or shmem.shmem_mype() != session.rank or shmem.shmem_npes() != size:
        message = (
            f"mori.shmem: init gave status {status}, this is rank {session.rank} of {size}; see MORI_SOCKET_IFNAME and "
            "MORI_BOOTSTRAP_TIMEOUT"
        )
        raise DistbenchError(message)
    _worlds.append(_World(mori, session.group, heap_bytes))
    return heap_bytes


def _all_are_in(mori: Any, session: Session, heap_bytes: int) -> bool:
    """Whether every rank of the group is still in a world of its own group, large enough; some may have left it."""
    mine = _worlds[0] if _worlds else None
    fits = mine is not None and (mine.mori, mine.group) == (mori, session.group) and mine.heap_bytes >= heap_bytes
    agreed = torch.tensor([fits], dtype=torch.int32, device=session.device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=session.group)
    return bool(agreed)


def leave_world() -> None:
    """Finalise shmem, if it was initialised: after the operators, before the process groups."""
    if _worlds:
        _worlds.pop().mori.shmem.shmem_finalize()


def check_batch(batch: TokenBatch, case: Case, plan: MoriPlan, device: torch.device) -> None:
    """Refuse what MoRI's kernels, which take addresses, would misread or write out of bounds with.

    Raises:
        DistbenchError: names the tensor, its value and the bound.

    """
    tokens = batch.hidden.shape[0]
    scales = case.hidden_size // 128
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "hidden": (
            batch.hidden,
            (tokens, case.hidden_size),
            torch.float8_e4m3fn if case.dispatch_dtype == "fp8" else torch.bfloat16,
        ),
        "weights": (batch.weights, (tokens, case.topk), torch.float32),
        "ids": (batch.ids, (tokens, case.topk), torch.int32),
    }
    if case.dispatch_dtype == "fp8":
        wanted["scales"] = (batch.scales, (tokens, scales), torch.float32)
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            _refuse(f"{name} are missing; {plan.kernel} reads them")
        if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            _refuse(f"{name} are {tensor.dtype} {list(tensor.shape)}, MoRI reads them as {dtype} {list(shape)}")
        if not tensor.is_contiguous() or tensor.device.type != device.type:
            _refuse(f"{name} are strided {tensor.stride()} on {tensor.device}; make them contiguous on {device}")
    if tokens > case.max_dispatch_tokens_per_rank:
        _refuse(f"{tokens} tokens, max_dispatch_tokens_per_rank is {case.max_dispatch_tokens_per_rank}; raise it")
    _check_ids(batch.ids, case, plan)


def check_routing_is_own(ids: Tensor, routing: Tensor) -> None:
    """Refuse ids in combine that are not those of dispatch: MoRI sums other tokens' rows and says nothing.

    Raises:
        DistbenchError: names the first row that differs.

    """
    if ids.shape != routing.shape:
        _refuse_ids(f"have {ids.shape[0]} rows, this rank dispatched {routing.shape[0]} tokens")
    wrong = (ids != routing).any(1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        _refuse_ids(f"of token {row} are {ids[row].tolist()}, dispatched were {routing[row].tolist()}")


def _check_ids(ids: Tensor, case: Case, plan: MoriPlan) -> None:
    if not ids.numel():
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 and plan.kernel not in SKIPS_NEGATIVE:
        _refuse(f"id {least}: {plan.kernel} sends a negative id to rank 0; use IntraNode, IntraNodeLL or InterNodeV1")
    if most >= case.num_experts and plan.kernel not in INTRA:
        _refuse(f"id {most}: the last expert is {case.num_experts - 1}, and {plan.kernel} asserts it; correct the ids")


def _whole(expert_out: Tensor, received: int) -> Tensor:
    """Return at least `received` contiguous rows: combine reads as many, whatever the tensor holds."""
    if expert_out.shape[0] >= received:
        return expert_out.contiguous()
    missing = expert_out.new_empty(received - expert_out.shape[0], expert_out.shape[1])
    poison_(missing)
    return torch.cat([expert_out, missing])


def _package(case: Case, device: torch.device) -> Any:
    if case.emulate:
        from distbench.emulation import mori as stand_in  # noqa: PLC0415 - only where it is asked for

        stand_in.assume(case.mori_habits)
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
    return mori


def _check_residency(plan: MoriPlan, device: torch.device) -> None:
    """Refuse a grid whose blocks would not all run at once: they wait for each other, and would for ever."""
    if device.type != "cuda" or plan.launch_mode == "AUTO":
        return
    units = torch.cuda.get_device_properties(device).multi_processor_count
    if plan.launch.blocks > units:
        message = f"mori: {plan.launch.blocks} blocks have to run at once, {device} has {units} compute units"
        raise Unsupported(message)


def _configuration(mori: Any, case: Case, plan: MoriPlan, rank: int) -> Any:
    """Return the package's configuration; nothing that it does not know is left out silently."""
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
    dtype = torch.float8_e4m3fn if case.dispatch_dtype == "fp8" else torch.bfloat16
    return mori.ops.EpDispatchCombineConfig(data_type=dtype, kernel_type=getattr(kernels, plan.kernel), **values)


@contextlib.contextmanager
def _barriers_within(group: dist.ProcessGroup) -> Iterator[None]:
    """Have MoRI's constructor wait for `group`, not for the whole job, part of which is not in this case."""
    barrier = dist.barrier
    dist.barrier = partial(barrier, group=group)
    try:
        yield
    finally:
        dist.barrier = barrier


def _facts(mori: Any, plan: MoriPlan, heap_bytes: int) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(plan)
    launch = plain.pop("launch")
    geometry = dict(zip(("block_num", "rdma_block_num", "warp_num_per_block"), launch, strict=True))
    if plan.launch_mode == "AUTO":
        geometry = dict.fromkeys(geometry)
    version = str(getattr(mori, "__version__", "unknown"))
    return {"mori": version, **plain, **geometry, "heap_size": heap_bytes}


def _refuse(reason: str) -> NoReturn:
    message = f"dispatch: {reason}"
    raise DistbenchError(message)


def _refuse_ids(reason: str) -> NoReturn:
    message = f"combine: ids {reason}; pass the rank's own routing, not the ids that dispatch returned"
    raise DistbenchError(message)
