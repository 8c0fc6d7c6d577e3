"""Environment, parallel sizes and device as SGLang's lifted code finds them on one rank of a case."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from distbench.callers.lift import Stub
from distbench.callers.setting import Setting
from distbench.callers.sglang.definitions import AITER_VARIABLES
from distbench.case.sglang_releases import DISPATCH_DTYPE, DISPATCH_TOKENS, EP_V2, LIMIT, RECV_BOUND


def variables(setting: Setting, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """SGLang's variables as text: those that keys of the case stand for, and aiter's as the environment has them."""
    case = setting.case
    return {name: environ[name] for name in AITER_VARIABLES if name in environ} | {
        LIMIT: str(setting.limit or 0),
        RECV_BOUND: str(case.recv_bound).lower(),
        DISPATCH_TOKENS: str(case.max_dispatch_tokens_per_rank),
        DISPATCH_DTYPE: case.dispatch_dtype,
        EP_V2: "false",
    }


def operating_system(setting: Setting) -> Stub:
    """The module `os` for lifted code: nothing but its view of the environment."""
    known = variables(setting)
    return Stub(environ=known, getenv=known.get)


def parallel(setting: Setting) -> SimpleNamespace:
    """Sizes and ranks of data-parallel attention over the ranks of expert parallelism."""
    ranks = setting.case.ep_size
    return SimpleNamespace(
        moe_ep_size=ranks,
        moe_ep_rank=setting.rank,
        tp_size=setting.case.tp_size or ranks,
        attn_cp_size=1,
        attn_dp_size=ranks,
        attn_dp_rank=setting.rank,
        attn_tp_size=1,
        attn_tp_rank=0,
    )


class _OnCpu:
    """`torch` for a rank on the CPU, where `torch.cuda.current_device()` names the CPU."""

    cuda = Stub(current_device=lambda: "cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def torch_on(device: torch.device) -> Any:
    """The module `torch` for lifted code on `device`."""
    return _OnCpu() if device.type == "cpu" else torch
