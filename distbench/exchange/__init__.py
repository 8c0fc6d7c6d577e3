"""How bytes get from rank to rank: through memory where ranks are on one host, else through `torch.distributed`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.exchange.base import Exchange
from distbench.exchange.collective import AllToAll, SendReceive, few_pairs
from distbench.exchange.shared_memory import SharedMemory


def choose_exchange(
    group: dist.ProcessGroup, shared: SharedMemory | None, counts: Tensor, device: torch.device
) -> Exchange:
    """Return how rows travel in a group: `counts` int64 [W, W] on the CPU are the rows that rank i sends to rank j.

    All ranks choose alike. `shared` is the memory that the group's ranks share, if they do.
    """
    if device.type != "cpu":
        return AllToAll(group)
    return shared or (SendReceive(group) if few_pairs(counts) else AllToAll(group))
