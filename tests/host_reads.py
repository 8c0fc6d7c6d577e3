"""Counter of host synchronisations other than copies to the device: reads of values, sizes that depend on them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {
    torch.ops.aten._local_scalar_dense.default,  # noqa: SLF001 - what int(), bool() and item() are
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
}


class HostReads(TorchDispatchMode):
    """Context in which `count` counts host synchronisations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        self.count += func in _WAITING
        return func(*args, **(kwargs or {}))
