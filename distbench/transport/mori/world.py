"""MoRI's shmem world: one per process, for one group of ranks and one heap size."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distbench.distributed.session import Session
from distbench.distributed.waits import collective
from distbench.errors import DistbenchError, Unsupported
from distbench.transport.mori.config import HEAP_SIZE, SHMEM_MODE, is_isolated

_UNIQUE_ID_BYTES = 128


class _World(NamedTuple):
    """The shmem world of a process: its ranks and the bytes of its heap."""

    mori: Any
    group: dist.ProcessGroup
    heap_bytes: int


_worlds: list[_World] = []


def join_world(mori: Any, session: Session, heap_bytes: int) -> int:
    """Join the shmem world of the session's group, or stay in it, and return the bytes of its heap. Collective.

    MoRI has one world per process: another group, or a larger heap, ends the previous one. The 128-byte rendezvous id
    is broadcast here, because MoRI's own way takes it from global rank 0.

    Raises:
        Unsupported: a second world, with kernels that would keep the state of the first.
    """
    if _all_are_in(mori, session, heap_bytes):
        return _worlds[0].heap_bytes
    with session.together():
        kernels = _kernels(mori)
    leave_world()
    kernels.clear()
    session.at_close(leave_world)
    told = os.environ.get(HEAP_SIZE)
    set_here = not told or is_isolated(os.environ)  # MoRI reads an empty value as a heap of 0 bytes
    if set_here:
        os.environ[HEAP_SIZE] = str(heap_bytes)
    os.environ.setdefault(SHMEM_MODE, "static_heap")
    shmem = mori.shmem
    word = torch.zeros(_UNIQUE_ID_BYTES, dtype=torch.uint8, device=session.device)
    if session.rank == 0:
        word.copy_(torch.frombuffer(bytearray(shmem.shmem_get_unique_id()), dtype=torch.uint8))
    with collective("broadcast", word.get_device()):
        dist.broadcast(word, group=session.group, group_src=0)
    size = dist.get_world_size(session.group)
    identity = bytes(word.cpu().tolist())
    with collective("construction of mori", word.get_device()):
        status = shmem.shmem_init_attr(shmem.MORI_SHMEM_INIT_WITH_UNIQUEID, session.rank, size, identity)
    if set_here:
        del os.environ[HEAP_SIZE]
        os.environ.update({HEAP_SIZE: told} if told else {})
    if status not in (0, None) or shmem.shmem_mype() != session.rank or shmem.shmem_npes() != size:
        message = (
            f"mori.shmem: init gave status {status}, this is rank {session.rank} of {size}; see MORI_SOCKET_IFNAME and "
            "MORI_BOOTSTRAP_TIMEOUT"
        )
        raise DistbenchError(message)
    _worlds.append(_World(mori, session.group, heap_bytes))
    return heap_bytes


def leave_world() -> None:
    """Finalise shmem, if it was initialised: after the operators, before the process groups."""
    if _worlds:
        _worlds.pop().mori.shmem.shmem_finalize()


def _kernels(mori: Any) -> dict[str, Any]:
    """Return the kernels that MoRI has loaded in this process; each learns of the world once, when loaded.

    Raises:
        Unsupported: a world must be left, and the release does not show its kernels.
    """
    kernels: dict[str, Any] | None = getattr(getattr(mori.ops, "_jit_loader", None), "_loaded_modules", None)
    if kernels is None and _worlds:
        message = (
            "transport mori: the installed mori does not show its loaded kernels, which would stay in the world of "
            "the previous case; start new ranks for this one, or install amd-mori 1.2.4"
        )
        raise Unsupported(message)
    return {} if kernels is None else kernels


def _all_are_in(mori: Any, session: Session, heap_bytes: int) -> bool:
    """Whether every rank of the group is still in a large enough world of its own group; some may have left it."""
    mine = _worlds[0] if _worlds else None
    fits = mine is not None and (mine.mori, mine.group) == (mori, session.group) and mine.heap_bytes >= heap_bytes
    agreed = torch.tensor([fits], dtype=torch.int32, device=session.device)
    with collective("all_reduce", agreed.get_device()):
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=session.group)
    return bool(agreed)
