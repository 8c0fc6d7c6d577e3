"""One rank of a case, as a caller's package finds it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distbench.case.spec import Case


class Setting(NamedTuple):
    """A rank of a case: `limit` is the manual limit in rows, None for off; `kernel` MoRI's kernel type.

    `sender_rows` are the tokens of each data-parallel rank in the scheduler's metadata.
    """

    case: Case
    rank: int
    device: torch.device
    limit: int | None
    kernel: str
    sender_rows: tuple[int, ...]
