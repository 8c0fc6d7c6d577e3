"""The question: a layer on its ranks, the tokens that a step may have, and the limits to examine."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from distbench.case.limits import LimitProof, Traffic, prove_limit
from distbench.case.sglang_releases import LIMIT
from distbench.case.spec import Case
from distbench.tools.advise.hits import Placement


class Question(NamedTuple):
    """What is asked. `case` has each rank's most tokens as its batch; `placement` are its slots of routed experts."""

    case: Case
    placement: Placement
    layers: int
    limit: int | None
    """Limit to judge; None for none."""
    nodes: int
    chance: float
    """Chance that a step may exceed a limit."""

    @property
    def variable(self) -> str:
        """Name of the limit in a launch script: SGLang's variable, or plainly the limit with another program."""
        return LIMIT if self.case.profile.startswith(("none", "sglang")) else "limit"

    def prove(self, limit: int | None) -> LimitProof:
        """Proof that a limit loses no row of any batch within the tokens, whatever its routing."""
        case = self.case
        return prove_limit(limit, Traffic(case.tokens, (sum(case.tokens),) * case.ep_size, case.capacity))

    @property
    def witness(self) -> Case:
        """A case in which rank 0 receives all tokens, so that no smaller limit than the bound is safe."""
        changed = {"routing": "hot-rank:0", "policy": "unchecked", "numerics": "exact"}
        return msgspec.structs.replace(self.case, **changed)
