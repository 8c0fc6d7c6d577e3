"""Assumptions of distbench about mori, SGLang, aiter, vLLM and deep_ep, as named facts about the text of their wheels.

The contract tests check them on pinned releases, `make drift` on the newest ones.
"""

from __future__ import annotations

from tests.contract.facts import (
    aiter_facts,
    constructor_facts,
    deep_ep_facts,
    mori_facts,
    sglang_facts,
    vllm_facts,
)
from tests.contract.facts.fact import Fact

_MODULES = (mori_facts, constructor_facts, sglang_facts, aiter_facts, vllm_facts, deep_ep_facts)
FACTS: tuple[Fact, ...] = tuple(fact for module in _MODULES for fact in module.FACTS)
