"""A plugin's transport, held to the contract: what breaks it is named, by the rule, on the rank where it happens."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from distbench.case.contract import Contract
from distbench.case.plugins import Plugin
from distbench.transport.base import Dispatched, Transport, TransportAround, TransportContext
from distbench.utils.text import shown
from distbench.workload.batch import TokenBatch

_TYPES = {"weights": torch.float32, "ids": torch.int32, "total_recv": torch.int32}


class CheckedTransport(TransportAround):
    """A plugin's transport, whose results are checked by shape, dtype, device and address; no device is waited for.

    Values are checked as those of any transport.
    """

    def __init__(self, context: TransportContext, plugin: Plugin) -> None:
        """Make the transport.

        Raises:
            BrokenContract: `make` raises, or returns anything else.
        """
        self._name = context.case.transport
        self._contract = Contract("transport", self._name)
        self._context, self._plugin = context, plugin
        self._addresses: tuple[int, ...] = ()
        self._total: Tensor | None = None
        self._tokens: tuple[int, int, torch.dtype] | None = None
        made: Any = self._contract.call("transport.made", plugin.make, context)
        if not isinstance(made, Transport):
            self._contract.refuse("transport.made", f"it returned a {type(made).__name__}")
        self._contract.call("transport.made", super().__init__, made)
        facts = self._contract.call("transport.facts", lambda: _facts_of(made))
        self.facts = {"plugin": self._name, **facts}
        self._contract.call("transport.facts", lambda: msgspec.json.encode([self.facts, self.about()]))

    def dispatch_send(self, batch: TokenBatch) -> None:
        """See `Transport.dispatch_send`."""
        self._contract.call("dispatch.returns", self._inner.dispatch_send, batch)

    def dispatch_recv(self) -> Dispatched:
        """See `Transport.dispatch_recv`.

        Raises:
            BrokenContract: an error, or buffers that are not as the contract has them.
        """
        found = self._contract.call("dispatch.returns", self._inner.dispatch_recv)
        self._check_dispatched(found)
        self._total = found.total_recv.clone()  # which the experts, or combine, may overwrite
        return found

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """See `Transport.combine_send`."""
        self._tokens = ids.shape[0], expert_out.shape[1], expert_out.dtype
        self._contract.call("combine.returns", self._inner.combine_send, expert_out, ids)

    def combine_recv(self) -> Tensor:
        """See `Transport.combine_recv`.

        Raises:
            BrokenContract: an error, or tokens that are not as the contract has them.
        """
        tokens = self._contract.call("combine.returns", self._inner.combine_recv)
        if not isinstance(tokens, Tensor):
            self._contract.refuse("combine.shape", f"it returned a {type(tokens).__name__}")
        if self._tokens is not None:
            count, columns, dtype = self._tokens
            self._expect("combine.shape", "tokens", list(tokens.shape), [count, columns])
            self._expect("combine.dtype", "tokens", tokens.dtype, dtype)
        self._expect("combine.device", "tokens", tokens.device, self._context.device)
        return tokens

    def sources(self) -> Tensor:
        """See `Transport.sources`.

        Raises:
            BrokenContract: an error, or another shape or dtype.
        """
        found = self._contract.call("sources.shape", self._inner.sources)
        total = 0 if self._total is None else int(self._total)
        if not isinstance(found, Tensor):
            self._contract.refuse("sources.shape", f"it returned a {type(found).__name__}")
        self._expect("sources.shape", "sources", [*found.shape, found.dtype], [total, 2, torch.int64])
        return found

    def about(self) -> dict[str, Any]:
        """See `Transport.about`."""
        return self._inner.about() | {f"transport {self._name}": self._plugin.about()}

    def _check_dispatched(self, found: Any) -> None:
        case, like = self._context.case, self._context.like
        if not isinstance(found, Dispatched):
            self._contract.refuse("dispatch.type", f"it returned a {type(found).__name__}")
        columns = {"hidden": case.hidden_size, "weights": case.topk_slots, "ids": case.topk_slots}
        if like.scales is not None:
            columns["scales"] = like.scales.shape[1]
        elif found.scales is not None:
            self._contract.refuse("dispatch.type", "it returned scales of a payload that has none")
        shapes = {name: [case.capacity, width] for name, width in columns.items()} | {"total_recv": [1]}
        types = _TYPES | {"hidden": like.hidden.dtype, "scales": torch.float32}
        for name, shape in shapes.items():
            part = getattr(found, name)
            if not isinstance(part, Tensor):
                self._contract.refuse("dispatch.type", f"{name} is a {type(part).__name__}")
            self._expect("dispatch.shape", name, list(part.shape), shape)
            self._expect("dispatch.dtype", name, part.dtype, types[name])
            self._expect("dispatch.device", name, part.device, self._context.device)
        addresses = tuple(getattr(found, name).data_ptr() for name in shapes)
        if self._addresses and addresses != self._addresses:
            moved = [name for name, old, new in zip(shapes, self._addresses, addresses, strict=True) if old != new]
            self._contract.refuse("dispatch.stays", f"{', '.join(moved)} moved since the last call")
        self._addresses = addresses

    def _expect(self, rule: str, what: str, found: Any, right: Any) -> None:
        if found != right:
            self._contract.refuse(rule, f"{what}: {_plain(found)} instead of {_plain(right)}")


def _facts_of(made: Transport) -> dict[str, Any]:
    return {**made.facts, "sum_order": made.sum_order._asdict(), **({"local_slots": True} if made.local_slots else {})}


def _plain(value: Any) -> str:
    return shown(value).replace("torch.", "").strip("'")
