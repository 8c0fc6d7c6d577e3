"""Capture of vLLM's MoRI prepare and finalize, read in 0.33.0. Loads neither torch nor vllm.

`activate` is vLLM's plugin `distbench_capture` (entry point `vllm.general_plugins`), which its processes call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from distbench.capture import hooks
from distbench.capture.settings import Place, Settings

if TYPE_CHECKING:
    from distbench.capture.recorder import Recorder

_MODULE, _CLASS = "vllm.model_executor.layers.fused_moe.prepare_finalize.mori", "MoriPrepareAndFinalize"
_META = 2


def recording(dispatcher: type, settings: Settings, source: str = "vllm") -> AbstractContextManager[None]:
    """Record the dispatches of vLLM's class `MoriPrepareAndFinalize` while the context is open."""
    return hooks.recording(dispatcher, "prepare", _recorded, settings, source)


def activate() -> None:
    """Record for as long as the process lives, if `DISTBENCH_CAPTURE` names a folder."""
    hooks.activate("vllm", _MODULE, _CLASS, recording, os.environ)


def _recorded(original: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    from distbench.capture.recorder import Dispatch  # noqa: PLC0415 - torch, where a capture is asked for

    @functools.wraps(original)
    def prepare(
        self: Any, a1: Any, topk_weights: Any, topk_ids: Any, num_experts: int, *arguments: Any, **named: Any
    ) -> Any:
        out = original(self, a1, topk_weights, topk_ids, num_experts, *arguments, **named)
        recorder.see(
            self,
            lambda: Dispatch(
                topk_ids,
                topk_weights,
                out[_META].expert_num_tokens,  # total_recv, whatever its name says
                0,  # vLLM cuts nothing
                lambda: _place(self, num_experts, topk_ids.shape[1]),
                (a1, None),  # before vLLM quantises them, which is within the call
            ),
        )
        return out

    return prepare


def _place(dispatcher: Any, num_experts: int, topk: int) -> tuple[Place, int]:
    config = dispatcher.mori_op.config
    return Place(int(config.rank), int(config.world_size), num_experts, topk), int(config.max_num_inp_token_per_rank)
