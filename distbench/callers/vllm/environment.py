"""The variable of vLLM that reaches the call of `fused_moe`, read as vLLM reads it."""

from __future__ import annotations

import os

from distbench.errors import InvalidCase

DISPATCH_POLICY = "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY"


def dispatch_policy() -> int:
    """Aiter's policy of sorting, 0 unless the environment has another.

    Raises:
        InvalidCase: the variable is no whole number; vLLM would raise ValueError.

    """
    text = os.environ.get(DISPATCH_POLICY, "0")
    try:
        return int(text)
    except ValueError as error:
        message = f"env:{DISPATCH_POLICY} = {text!r:.60}: no whole number, and vLLM would end; correct or unset it"
        raise InvalidCase(message) from error
