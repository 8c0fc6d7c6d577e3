"""A session inside a process group that somebody else has made: a torchrun job, a notebook, a test."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist

from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.session import Session
from distbench.distributed.waits import collective
from distbench.errors import InvalidCase, Unsupported
from distbench.utils.devices import runs_on_device
from distbench.utils.variables import whole

_LOCAL_RANKS = "LOCAL_WORLD_SIZE"


class GroupSession(Session):
    """Session of the ranks of an existing group, over a group of the bench with the same ranks; see `Session`.

    Its device is the one that each rank has selected (`torch.cuda.set_device`).
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Make a group of the same ranks, with gloo, and NCCL where the group has it. Collective over `group`.

        Raises:
            InvalidCase: torch.distributed is not initialised, this process is not in the group, or LOCAL_WORLD_SIZE is
                no number of ranks.
        """
        if not dist.is_initialized():
            message = "run_in_group: torch.distributed is not initialised; call init_process_group first"
            raise InvalidCase(message)
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            message = "run_in_group: this process is not in the group; call it on the group's ranks only"
            raise InvalidCase(message)
        self.heartbeat = Heartbeat(None)
        self.world_size = dist.get_world_size(group)
        self.local_ranks = min(_launched_here(self.world_size), self.world_size)
        self.device = torch.device("cpu")
        self.shared = None
        on_devices = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))
        self._devices = self.local_ranks if on_devices else 0
        self._shares = False
        self._connected: set[int] = set()
        self._closing = contextlib.ExitStack()
        self.group = _own_group(group, "cpu:gloo,cuda:nccl" if on_devices else "gloo")

    def use(self, asked: str, *, shared: bool = False) -> None:
        """See `Session.use`.

        Raises:
            Unsupported: a device is asked for, and the group has no NCCL.
        """
        if asked == "cuda" and not self._devices:
            message = "device = cuda: the group has no NCCL; initialise it with nccl, or use device cpu"
            raise Unsupported(message)
        if runs_on_device(asked, self._devices, self.local_ranks, shared=shared):
            self.device = torch.device("cuda", torch.cuda.current_device())
            self._connect_devices()

    def close(self) -> None:
        """Leave; the group is kept for the next session, until the job destroys its groups."""
        self._closing.close()


def _launched_here(world_size: int) -> int:
    """Ranks that the job's launcher started on this host; `world_size` where it does not say."""
    return whole(_LOCAL_RANKS, os.environ.get(_LOCAL_RANKS, str(world_size)), least=1)


_groups: dict[tuple[int, tuple[int, ...], str], tuple[Any, dist.ProcessGroup]] = {}


def _own_group(group: dist.ProcessGroup | None, backend: str) -> dist.ProcessGroup:
    """Return a group of the ranks of `group` that is the bench's own. Collective over it when it is made.

    It is made once: torch names a group after its ranks, and a second one of that name may meet, in the store, the
    addresses of the first.
    """
    world = dist.group.WORLD
    ranks = tuple(dist.get_process_group_ranks(group or world))
    key = (id(world), ranks, backend)
    known = _groups.get(key)
    if known is None or known[0] is not world:
        with collective("group creation"):
            made = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
        known = _groups[key] = world, made
    return known[1]
