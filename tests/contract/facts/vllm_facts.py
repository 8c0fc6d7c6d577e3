"""vLLM: the definitions that its caller lifts."""

from __future__ import annotations

from distbench.callers.vllm.definitions import DEFINITIONS
from tests.contract.facts.lifted import lifted_facts

PACKAGE = "vllm"
FACTS = lifted_facts(PACKAGE, DEFINITIONS)
