"""Memory that every rank of a case maps from every other: on devices torch's symmetric memory, on the CPU a memfd."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.distributed.session import Session
from distbench.distributed.waits import collective
from distbench.errors import Unsupported
from distbench.transport.symmetric.plan import MOST_RANKS
from distbench.utils.devices import interpreted
from distbench.utils.text import one_line

_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Variable of torch (`CUDASymmetricMemory.cu`, 2.5 and later): 1 lets ranks of one device map each other's memory."""


class Mapped(NamedTuple):
    """This rank's memory, uint8 [size], and the address of each rank's in this process, int64 [W] on its device.

    `kept` owns the mappings, which last as long as it does.
    """

    mine: Tensor
    addresses: Tensor
    kept: Any


def check_mappable(session: Session, devices: list[int]) -> None:
    """Refuse ranks that cannot map each other's memory; `devices` are the numbers of theirs.

    Raises:
        Unsupported: names the reason, and the fix.
    """
    ranks = dist.get_world_size(session.group)
    if ranks > MOST_RANKS:
        message = f"transport symmetric: {ranks} ranks, the kernels take up to {MOST_RANKS}; use --transport collective"
        raise Unsupported(message)
    if session.local_ranks < ranks:
        message = (
            f"transport symmetric: {ranks} ranks on several hosts, {session.local_ranks} on this one; ranks map memory "
            "of one host only; use --transport collective"
        )
        raise Unsupported(message)
    if find_spec("triton") is None:
        message = "transport symmetric: Triton is not installed; install triton>=3.6 next to torch"
        raise Unsupported(message)
    if session.device.type == "cpu":
        _check_interpreted(session)
    else:
        _check_peer_access(session.device.index, devices)


def map_memory(session: Session, size: int) -> Mapped:
    """Allocate `size` bytes, zeroed, on each rank of the case, and map all. Collective.

    Raises:
        Unsupported: torch cannot map a peer's memory.
    """
    mapped = _map_files(session, size) if session.device.type == "cpu" else _map_devices(session, size)
    mapped.mine.zero_()
    return mapped


def _check_interpreted(session: Session) -> None:
    if not interpreted():
        message = (
            "transport symmetric: the ranks compute on the CPU, its kernels on GPUs; set TRITON_INTERPRET=1 for tiny "
            "cases, or, where there are GPUs, use --device cuda, with --share-devices for fewer GPUs than ranks"
        )
        raise Unsupported(message)
    if session.shared is None and dist.get_world_size(session.group) > 1:
        message = (
            "transport symmetric, interpreted: the ranks share no memory on this host; start them as one user, in one "
            "container, without DISTBENCH_SHARED_MEMORY=0"
        )
        raise Unsupported(message)


def _check_peer_access(mine: int, devices: list[int]) -> None:
    for device in devices:
        if device != mine and not torch.cuda.can_device_access_peer(mine, device):
            message = (
                f"transport symmetric: device {mine} cannot map the memory of device {device}; `distbench doctor` "
                "shows how they are linked; use --transport collective"
            )
            raise Unsupported(message)


def _map_devices(session: Session, size: int) -> Mapped:
    from torch.distributed import _symmetric_memory as symmetric  # noqa: PLC0415 - loaded only by this transport

    os.environ.setdefault(_NO_MULTICAST, "1")
    if session.shares_devices:
        os.environ[_OVERLAPPING] = "1"
    try:
        mine = symmetric.empty(size, dtype=torch.uint8, device=session.device)
        with collective("group creation", session.device.index):
            handle = symmetric.rendezvous(mine, session.group)
    except RuntimeError as error:
        message = f"transport symmetric: torch {torch.__version__} cannot map the ranks' memory ({one_line(error)})"
        raise Unsupported(message) from error
    return Mapped(mine, torch.tensor(list(handle.buffer_ptrs), device=session.device), handle)


def _map_files(session: Session, size: int) -> Mapped:
    file = os.memfd_create("distbench-symmetric")
    os.ftruncate(file, size)
    cards = session.everyones(torch.tensor([os.getpid(), file])).tolist()
    maps, addresses = [], []
    for rank, (process, number) in enumerate(cards):
        opened = file if rank == session.rank else os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
        maps.append(torch.frombuffer(mmap.mmap(opened, size), dtype=torch.uint8))
        addresses.append(maps[-1].data_ptr())
        if rank != session.rank:
            os.close(opened)
    session.everyones(torch.tensor([0]))  # all have opened this rank's file
    with suppress(OSError):
        os.close(file)
    return Mapped(maps[session.rank], torch.tensor(addresses), maps)
