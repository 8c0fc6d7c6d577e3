"""Capture of SGLang's MoRI dispatcher, read in 0.5.23. Loads neither torch nor sglang.

`activate` is SGLang's plugin `distbench_capture` (entry point `sglang.srt.plugins`), which its processes call.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from distbench.capture import hooks
from distbench.capture.settings import Place, Settings

if TYPE_CHECKING:
    from distbench.capture.recorder import Recorder

_MODULE, _CLASS = "sglang.srt.layers.moe.token_dispatcher.moriep", "MoriEPDispatcher"
_SENT = 6
"""Parts that a dispatch leaves between its halves: hidden states, weights, ids, scales, dtype and event."""


def recording(dispatcher: type, settings: Settings, source: str = "sglang") -> AbstractContextManager[None]:
    """Record the dispatches of SGLang's class `MoriEPDispatcher` while the context is open."""
    return hooks.recording(dispatcher, "dispatch_b", _recorded, settings, source)


def activate() -> None:
    """Record for as long as the process lives, if `DISTBENCH_CAPTURE` names a folder."""
    hooks.activate("sglang", _MODULE, _CLASS, recording, os.environ)


def _recorded(original: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    from distbench.capture.recorder import Dispatch  # noqa: PLC0415 - torch, where a capture is asked for

    @functools.wraps(original)
    def dispatch_b(self: Any) -> Any:
        sent = getattr(self, "_dispatch_intermediate_state", ()) if recorder.keeps_tensors else ()
        out = original(self)
        recorder.see(
            self,
            lambda: Dispatch(
                out.origin_topk_ids,
                out.origin_topk_weights,
                out.num_recv_tokens_per_expert,  # total_recv, whatever its name says
                out.recv_cap,
                lambda: _place(self, original),
                _hidden(sent, out.origin_topk_ids),
            ),
        )
        return out

    return dispatch_b


def _hidden(sent: Any, ids: Any) -> tuple[Any, Any] | None:
    """Hidden states and scales of what `dispatch_a` left for `dispatch_b`; None where those are received ones.

    The low-latency dispatcher has sent them by then, and keeps what it receives.
    """
    return (sent[0], sent[3]) if len(sent) == _SENT and sent[2] is ids else None


def _place(dispatcher: Any, method: Any) -> tuple[Place, int]:
    part = dispatcher._get_impl()  # noqa: SLF001 - SGLang keeps the sizes of a layer there
    rank = inspect.unwrap(method).__globals__["get_parallel"]().moe_ep_rank
    place = Place(int(rank), part.num_experts // part.num_local_experts, part.num_experts, part.router_topk)
    return place, part.num_max_dispatch_tokens_per_rank
