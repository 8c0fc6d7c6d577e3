"""`mori.shmem`: membership and the symmetric heap. One world per process, as in the package."""

from __future__ import annotations

import os
import secrets
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distbench.transport.mori.emulated.heap import Heap
from distbench.transport.mori.emulated.quirks import refuse
from distbench.transport.mori.heap_size import parse_heap_size

MORI_SHMEM_INIT_WITH_MPI_COMM = 0
MORI_SHMEM_INIT_WITH_UNIQUEID = 1
NOT_IMITATED = (
    *("shmem_mpi_init", "shmem_module_init", "shmem_barrier_on_stream", "shmem_malloc", "shmem_malloc_align"),
    *("shmem_ext_malloc_with_flags", "shmem_free", "shmem_buffer_register", "shmem_buffer_deregister"),
    *("shmem_ptr_p2p", "shmem_num_qp_per_pe"),
)
"""Functions of the package that raise NotImplementedError here."""

_UNIQUE_ID_BYTES = 128
_DEFAULT_HEAP = "4G"


class World(NamedTuple):
    """The ranks that share a heap, as this rank sees them; `name` is unique to the world and equal on its ranks."""

    name: str
    group: dist.ProcessGroup
    rank: int
    size: int
    heap: Heap


_worlds: list[World] = []


def __getattr__(name: str) -> Any:
    if name in NOT_IMITATED:
        refuse(name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def shmem_get_unique_id() -> bytes:
    """Return a new world's unique id, 128 bytes, for one rank to distribute."""
    return secrets.token_bytes(_UNIQUE_ID_BYTES)


def shmem_init_attr(flags: int, rank: int, nranks: int, unique_id: bytes) -> int:
    """Join the world of `unique_id`; return 0 on success, or if one was joined already. Collective over its ranks."""
    if flags != MORI_SHMEM_INIT_WITH_UNIQUEID or len(unique_id) != _UNIQUE_ID_BYTES:
        return -1
    if not _worlds:
        name = f"mori/{unique_id.hex()[:32]}"
        members = _members(name, rank, nranks)
        size = parse_heap_size(os.environ.get("MORI_SHMEM_HEAP_SIZE", _DEFAULT_HEAP))
        _worlds.append(World(name, _group_of(members), rank, nranks, Heap(size, _device())))
    return 0


def _group_of(members: tuple[int, ...]) -> dist.ProcessGroup:
    """Return the process's group of `members`; create it if there is none.

    torch names a group that only its members create by the number of groups that each of them has, so members with
    different numbers would wait for each other forever.
    """
    for existing in vars(dist.distributed_c10d)["_world"].pg_group_ranks:
        if dist.get_process_group_ranks(existing) == list(members):
            found: dist.ProcessGroup = existing
            return found
    group: dist.ProcessGroup = dist.new_group(members, use_local_synchronization=True)
    return group


def shmem_torch_process_group_init(group_name: str) -> int:
    """Join the world of a registered process group; it must contain global rank 0, the source of the id."""
    resolve = vars(dist.distributed_c10d)["_resolve_process_group"]  # like the package
    group = resolve(group_name)
    ids = [shmem_get_unique_id()]
    dist.broadcast_object_list(ids, src=0, group=group)
    return shmem_init_attr(MORI_SHMEM_INIT_WITH_UNIQUEID, dist.get_rank(group), dist.get_world_size(group), ids[0])


def shmem_finalize() -> int:
    """Leave the world and release its heap."""
    _worlds.clear()
    return 0


def shmem_mype() -> int:
    """Return this rank's index in the world."""
    return world().rank


def shmem_npes() -> int:
    """Return the number of ranks in the world."""
    return world().size


def shmem_barrier_all() -> None:
    """Wait for all ranks of the world."""
    dist.barrier(group=world().group)


def world() -> World:
    """Return the joined world.

    Raises:
        RuntimeError: no world was joined.
    """
    if not _worlds:
        message = "mori.shmem is not initialised"
        raise RuntimeError(message)
    return _worlds[0]


def store() -> Any:
    """Return the job's store, through which ranks exchange messages."""
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public name for it


def _members(name: str, rank: int, nranks: int) -> tuple[int, ...]:
    """Return the global ranks of a world, which meet in the job's store under its name."""
    store().set(f"{name}/{rank}", str(dist.get_rank()))
    return tuple(int(store().get(f"{name}/{member}")) for member in range(nranks))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")
