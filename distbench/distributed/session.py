"""One rank's session among the ranks that torchrun started: process groups, device, and agreement between ranks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.peers import find_neighbours
from distbench.distributed.shared_memory import SharedMemory, mapped_bytes
from distbench.distributed.waits import collective, waiting
from distbench.errors import InvalidCase, Unsupported
from distbench.utils.devices import runs_on_device
from distbench.utils.process import usable_cores
from distbench.utils.variables import shares_memory

# Just below the largest threshold that glibc adopts, 32 MiB.
_KEPT_BYTES = (32 << 20) - (64 << 10)
_WORD_BYTES = 8
# Poll interval of a rank outside the group, and its heartbeat interval, which keeps it from counting as hung.
_POLL_S = 0.02
_SAID_S = 0.5


class _Group(NamedTuple):
    """Some ranks of a launch, and the memory that they share; None where they are on several hosts."""

    process_group: dist.ProcessGroup
    shared: SharedMemory | None


class Session:
    """Open for a whole launch, over many cases. `local_ranks` of its ranks are on this node.

    `group` are the ranks of the case. `shared` is their shared memory, if they are on one host.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        timeout_s: float,
        environ: Mapping[str, str] = os.environ,
        *,
        accelerated: bool = False,
        shares: bool = False,
    ) -> None:
        """Join the process group that torchrun's variables describe; no collective may take `timeout_s`. Collective.

        `accelerated` takes a device for each rank of the node, and joins NCCL (on ROCm: RCCL) as well as gloo.
        With `shares` the ranks of a node with fewer devices share them in turn: NCCL refuses that, gloo does not.
        """
        self.heartbeat = heartbeat
        self.rank = int(environ["RANK"])
        self.world_size = int(environ["WORLD_SIZE"])
        self.device = torch.device("cpu")
        self._local_rank = int(environ.get("LOCAL_RANK", "0"))
        self.local_ranks = int(environ.get("LOCAL_WORLD_SIZE", "1"))
        self._devices = torch.cuda.device_count() if accelerated else 0
        self._shares = shares and 0 < self._devices < self.local_ranks
        _share_cores(self._local_rank, self.local_ranks)
        _keep_freed_memory()
        backend = "cpu:gloo,cuda:nccl" if self._devices >= self.local_ranks else "gloo"  # which takes both
        timeout = timedelta(seconds=timeout_s)
        self._timeout_s = timeout_s
        self._sharing = shares_memory(environ)
        with collective("group creation"):
            store, _, _ = next(rendezvous("env://", timeout=timeout))
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        self.group, self.shared = world = self._group_of(_world_group())
        if accelerated:
            self._devices = self._fewest_devices()
        self._groups = {self.world_size: world}
        self._created = {self.world_size}
        self._connected: set[int] = set()
        self._entered = self.world_size
        self._calls = 0
        self._store = store
        self._closing = contextlib.ExitStack()

    def enter(self, ep_size: int) -> bool:
        """Make the first `ep_size` ranks the group of the next case; whether this rank is in it. Collective there.

        Ranks outside proceed at once, and wait at the next case that needs them, through all cases in between, without
        a time limit. Rank 0 calls them before that case begins; until then they are ahead of it.
        """
        before, self._entered = self._entered, ep_size
        self._calls += ep_size > before
        if self.rank >= ep_size:
            self._create_group(ep_size)
            return False
        call = f"distbench/call-{self._calls}"
        if self.rank == 0 and ep_size > before:
            self._store.set(call, "")
        self.heartbeat.mark(Stage.START)
        if self.rank >= before:
            self._wait_for(call)
        self._create_group(ep_size)
        self.group, self.shared = self._groups[ep_size]
        return True

    def _create_group(self, ep_size: int) -> None:
        """Create the group of the first `ep_size` ranks, once. Collective there; other ranks return at once.

        torch names a group by the number of groups that the process has created or joined, so all ranks have to call
        this for all groups in one order: the order of the cases.
        """
        if ep_size in self._created:
            return
        self._created.add(ep_size)
        if self.rank >= ep_size:
            dist.new_group(list(range(ep_size)))
            return
        with collective("group creation"):
            members = dist.new_group(list(range(ep_size)))
        self._groups[ep_size] = self._group_of(members)

    def _group_of(self, members: dist.ProcessGroup) -> _Group:
        """A group with the memory that its ranks share, if they do. Collective."""
        everyones = partial(_table, members)
        with waiting("group creation"):
            size = mapped_bytes(dist.get_world_size(members))
            found = find_neighbours(self.rank, everyones, size, willing=self._sharing)
        return _Group(members, found and SharedMemory(found, self._timeout_s))

    def _wait_for(self, call: str) -> None:
        """Wait without a time limit. Polls: whenever the store's own wait times out, torch prints a warning."""
        said = time.monotonic()
        with waiting("store of the launch"):
            while not self._store.check([call]):
                if time.monotonic() - said > _SAID_S:
                    self.heartbeat.mark(Stage.START)
                    said = time.monotonic()
                time.sleep(_POLL_S)

    def use(self, asked: str, *, shared: bool = False) -> None:
        """Select the device for the next case: `cpu`, `cuda`, or `auto`, which all ranks of the launch resolve alike.

        `shared`: the ranks of a node may share its devices. Collective, in the case's group, where it is a device.

        Raises:
            Unsupported: on every rank, where `cuda` was requested and a node has fewer devices than ranks.

        """
        if not runs_on_device(asked, self._devices, self.local_ranks, shared=shared):
            self.device = torch.device("cpu")
            return
        self.device = self.own_device
        torch.cuda.set_device(self.device)
        if not self._shares:
            self._connect_devices()

    @property
    def shares_devices(self) -> bool:
        """Whether ranks of this node compute on one device."""
        return self._shares and self.device.type != "cpu"

    @property
    def ranks_per_device(self) -> int:
        """The most ranks of this node that compute on one device."""
        return -(-self.local_ranks // self._devices) if self.shares_devices else 1

    def _connect_devices(self) -> None:
        """Have NCCL connect the devices of the case's group, once: else the group's first dispatch would pay for it.

        It takes seconds, and the limit of a stage is no allowance for it. Collective, in the case's group.
        """
        ranks = dist.get_world_size(self.group)
        if ranks in self._connected:
            return
        self._connected.add(ranks)
        if ranks > 1:
            mine = torch.zeros(ranks, device=self.device)
            with collective("group creation", mine.get_device()):
                dist.all_to_all_single(torch.empty_like(mine), mine, group=self.group)
                torch.cuda.synchronize(self.device)

    @property
    def own_device(self) -> torch.device:
        """The device of this rank, or the CPU where some node has fewer devices than ranks that do not share them."""
        if self._shares:
            return torch.device("cuda", self._local_rank % self._devices)
        enough = 0 < self.local_ranks <= self._devices
        return torch.device("cuda", self._local_rank) if enough else torch.device("cpu")

    def agree(self, case_digest: str, probe: Tensor, counts: Tensor) -> Tensor:
        """Prove that all ranks hold one case and one workload, and return the row counts of all ranks. Collective.

        `case_digest` is the case's hash, `probe` int64 [p] a digest of generated inputs that every rank must share,
        `counts` int64 [W] the rows that this rank sends to each. Returns int64 [W, W] on the CPU.

        Raises:
            InvalidCase: on every rank, naming the ranks that differ from rank 0.

        """
        raw = bytearray.fromhex(case_digest)
        words = torch.frombuffer(raw, dtype=torch.int64)
        table = self.everyones(torch.cat([words, probe.cpu(), counts.cpu()]))
        shared = len(raw) // _WORD_BYTES
        agreed = table[:, : shared + probe.numel()]
        if not torch.equal(agreed, agreed[:1].expand_as(agreed)):
            _refuse_strangers(agreed[:, :shared], "case's hash", "start all ranks with the same case and environment")
            _refuse_strangers(agreed[:, shared:], "generated inputs", "use one torch version on all ranks")
        return table[:, shared + probe.numel() :].clone()

    def require_same(self, value: int, what: str, fix: str) -> None:
        """Refuse, on every rank of the case's group, ranks that hold another `value` than rank 0. Collective.

        Raises:
            InvalidCase: names those ranks, the subject `what`, and the fix.

        """
        table = self.everyones(torch.tensor([value]))
        _refuse_strangers(table, what, fix)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make every rank of the case's group refuse an input that one of them refuses here. Collective at its end.

        Raises:
            InvalidCase, Unsupported: as raised here, or by the first other rank that raised, which is named.

        """
        refusal: InvalidCase | Unsupported | None = None
        try:
            yield
        except (InvalidCase, Unsupported) as error:
            refusal = error
        if not self.on_any_rank(value=refusal is not None):
            return
        told: list[tuple[type[InvalidCase | Unsupported], str] | None] = [None] * dist.get_world_size(self.group)
        with collective("all_gather"):
            dist.all_gather_object(told, None if refusal is None else (type(refusal), str(refusal)), group=self.group)
        rank, (kind, message) = next((rank, one) for rank, one in enumerate(told) if one is not None)
        raise refusal or kind(f"rank {rank}: {message}")

    def on_any_rank(self, *, value: bool) -> bool:
        """Whether `value` is true on any rank of the case's group. Collective."""
        return self.flags_on_any_rank([value])[0]

    def flags_on_any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Return which of `flags`, as many on every rank, are true on any rank of the case's group. Collective."""
        if self.shared is not None:
            return [any(column) for column in zip(*self.shared.words(bytes(flags)), strict=True)]
        anywhere: list[bool] = self.everyones(torch.tensor(flags)).any(0).tolist()
        return anywhere

    def gathered(self, mine: Tensor) -> Tensor:
        """Tensors of all ranks, of one shape and dtype: [W, ...] on rank 0, [0, ...] elsewhere.

        Collective, in the case's group.
        """
        if self.shared is not None and mine.device.type == "cpu":
            return self.shared.gathered(mine)
        everyone = mine.new_empty(dist.get_world_size(self.group) if self.rank == 0 else 0, *mine.shape)
        with collective("gather", mine.get_device()):
            dist.gather(mine, list(everyone) or None, group=self.group, group_dst=0)
        return everyone

    def announce(self, value: int) -> int:
        """Rank 0's value on every rank. Collective, over all ranks of the launch."""
        return self.share([value])[0]

    def share(self, values: Sequence[int]) -> list[int]:
        """Rank 0's values on every rank; all ranks pass the same number. Collective, over all ranks of the launch."""
        shared = torch.tensor(values, dtype=torch.int64)
        with collective("broadcast"):
            dist.broadcast(shared, group=self._groups[self.world_size].process_group, group_src=0)
        numbers: list[int] = shared.tolist()
        return numbers

    def meet(self) -> None:
        """Barrier over all ranks of the launch. Collective."""
        with collective("barrier"):
            dist.all_reduce(torch.zeros(1, dtype=torch.int64), group=self._groups[self.world_size].process_group)

    def at_close(self, leave: Callable[[], None]) -> None:
        """Register `leave`, called before the process groups are destroyed, in reverse order of registration."""
        self._closing.callback(leave)

    def close(self) -> None:
        """Destroy the process groups."""
        self._closing.close()
        dist.destroy_process_group()

    def _fewest_devices(self) -> int:
        """Number of this node's devices, or 0 where some node has fewer devices than ranks. Collective."""
        enough = torch.tensor([self._devices >= self.local_ranks or self._shares], dtype=torch.int64)
        with collective("all_reduce"):
            dist.all_reduce(enough, op=dist.ReduceOp.MIN)
        self._shares = self._shares and bool(enough)
        return self._devices if int(enough) else 0

    def everyones(self, mine: Tensor) -> Tensor:
        """Return rows [c] of all ranks of the case's group, on the CPU, as [W, c]. Collective."""
        return _table(self.group, mine) if self.shared is None else self.shared.everyones(mine)


def _table(group: dist.ProcessGroup, mine: Tensor) -> Tensor:
    """Rows [c] of all ranks, as [W, c]. With gloo, gather and broadcast take a fifth of the time of all-gather."""
    table = mine.new_empty(dist.get_world_size(group), mine.numel())
    with collective("all_gather", mine.get_device()):
        dist.gather(mine, list(table) if dist.get_rank(group) == 0 else None, group=group, group_dst=0)
        dist.broadcast(table, group=group, group_src=0)
    return table


def _share_cores(local_rank: int, local_ranks: int) -> None:
    """Give each rank its share of the threads; where ranks outnumber cores, use batch scheduling and pin to a core.

    Otherwise a message that wakes one rank would preempt another in the middle of its work, which costs tiny cases
    about a seventh of their time, and might wake it on another core than its cached data: a sixteenth. Cores that would
    get unequal numbers of ranks are left to the scheduler.
    """
    cores = usable_cores()
    torch.set_num_threads(max(cores // local_ranks, 1))
    if local_ranks <= cores or not hasattr(os, "SCHED_BATCH"):
        return
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) == cores and local_ranks % cores == 0:
            os.sched_setaffinity(0, {allowed[local_rank % cores]})


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB for the next case.

    glibc raises its thresholds when a mapped block that large is freed (mallopt(3)). Otherwise the weights of a tiny
    case go back to the kernel, and the next case pays for 1,300 page faults on each rank. The block is never written,
    so it takes no memory.
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)


def _world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        message = "torch.distributed has no world group right after it was made"
        raise RuntimeError(message)
    return group


def _refuse_strangers(table: Tensor, what: str, fix: str) -> None:
    strangers = (table != table[0]).any(1).nonzero().flatten().tolist()
    if strangers:
        ranks = ", ".join(str(rank) for rank in strangers[:16])
        message = f"ranks disagree on the {what}: rank {ranks} unlike rank 0; {fix}"
        raise InvalidCase(message)
