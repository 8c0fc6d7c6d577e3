"""Small cases for tests."""

from __future__ import annotations

from typing import Any

from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case


def tiny_case(ep_size: int = 4, **values: Any) -> Case:
    """Return a case of the `tiny` layer with a small receive buffer and, unless asked for others, exact inputs only."""
    defaults = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "numerics": "exact"}
    return resolve_case([Layer("test", defaults | values)], ep_size).case
