"""Where a rank waits for rows that travel: whoever reads its stack knows this file as a place of waiting (hang.py)."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist


def wait_for(travel: Iterable[dist.Work]) -> None:
    """Return when the rows are there; on a device the device waits, and the host goes on."""
    for work in travel:
        work.wait()
