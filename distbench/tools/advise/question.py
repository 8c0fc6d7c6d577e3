"""The question: a layer on its ranks, the tokens that a step may have, and the limits to examine."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from distbench.case.limits import LimitProof, Traffic, prove_limit
from distbench.case.sglang_releases import LIMIT
from distbench.case.spec import Case
from distbench.errors import InvalidCase
from distbench.tools.advise.hits import Placement

_MOST_SHARED = 2
_ARE = {1: "is", 2: "are"}


class Question(NamedTuple):
    """What is asked. `case` has the routed slots as its experts, and each rank's most tokens as its batch."""

    case: Case
    placement: Placement
    shared: int
    """Slots of a shared expert on each rank, which every token of the rank takes."""
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

    @property
    def kernel_case(self) -> Case:
        """The case as its kernels are selected: with the shared slots among the experts and the top-k."""
        local = self.case.experts_per_rank + self.shared
        changed: dict[str, Any] = {"num_experts": local * self.case.ep_size, "topk": self.case.topk + self.shared}
        return msgspec.structs.replace(self.case, **changed)

    def prove(self, limit: int | None) -> LimitProof:
        """Proof that a limit loses no row of any batch within the tokens, whatever its routing."""
        case = self.case
        return prove_limit(limit, Traffic(case.tokens, (sum(case.tokens),) * case.ep_size, case.capacity))

    @property
    def witness(self) -> Case:
        """A case in which rank 0 receives all tokens, so that no smaller limit than the bound is safe."""
        changed = {"routing": "hot-rank:0", "policy": "unchecked", "numerics": "exact"}
        return msgspec.structs.replace(self.case, **changed)


def refuse_uneven(num_experts: int, ep_size: int) -> None:
    """Refuse experts that the ranks cannot share evenly, with what they may be.

    Raises:
        InvalidCase: the number of slots is no multiple of the ranks.

    """
    if num_experts % ep_size == 0:
        return
    whole = num_experts // ep_size * ep_size
    ways = [f"--physical-experts {whole + ep_size} if some are replicated"]
    shared = num_experts - whole
    if whole and shared <= _MOST_SHARED:
        ways.append(f"--num-experts {whole} --shared-slots {shared} if {shared} of them {_ARE[shared]} shared")
    message = f"{num_experts} experts on {ep_size} ranks: not the same number on each; give {', or '.join(ways)}"
    raise InvalidCase(message)
