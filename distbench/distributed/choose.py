"""Exchange of bytes between ranks: through memory where all ranks are on one host, else by `torch.distributed`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.distributed.all_to_all import AllToAll, SendReceive, few_pairs
from distbench.distributed.exchange import Exchange
from distbench.distributed.shared_memory import SharedMemory


def choose_exchange(
    group: dist.ProcessGroup, shared: SharedMemory | None, counts: Tensor, device: torch.device
) -> Exchange:
    """Return the exchange for a group; `counts` int64 [W, W] on the CPU are the rows from rank i to rank j.

    All ranks choose alike. `shared` is the memory that the group's ranks share, if any.
    """
    if device.type != "cpu":
        return AllToAll(group)
    return shared or (SendReceive(group) if few_pairs(counts) else AllToAll(group))
