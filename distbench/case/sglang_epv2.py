"""SGLang's choice between MoRI's two APIs, under a profile of SGLang's EPv1.

Source: `_resolve_mori_ep_v2` and `_mori_epv2_unsupported_reason` of the wheels 0.5.22 and 0.5.23
(`arg_groups/moe_hook.py`). SGLANG_MORI_EP_V2=true overrides all reasons; it is UNSUPPORTED where variables are read.
"""

from __future__ import annotations

from collections.abc import Mapping

from distbench.case.profiles import NO_PROFILE, program_of
from distbench.case.sglang_releases import EP_V2, EP_V2_WORDS, NEWEST, SDMA, reads, sglang_enables
from distbench.case.spec import Case
from distbench.errors import Unsupported

_USE_AITER = "SGLANG_USE_AITER"
_VALIDATED = "deepseek-v4"
_HOST_RANKS = 8


def epv2_notes(environ: Mapping[str, str], case: Case) -> tuple[str, ...]:
    """Say why SGLang falls back to EPv1 where it prefers EPv2; nothing where it has no choice, or there is no profile.

    Raises:
        Unsupported: SGLang would run MoRI's second API.

    """
    sglang = case.profile != NO_PROFILE and program_of(case.profile) == "sglang"
    if not sglang or not reads(EP_V2, case.sglang_version) or environ.get(EP_V2, "").strip():
        return ()
    release, reason = f"SGLang {case.sglang_version or NEWEST}", _fall_back(environ, case)
    if not reason:
        message = (
            f"env:{EP_V2} is unset: {release} takes MoRI's second API for this case, and profile {case.profile} is its "
            f"first; set {EP_V2}=false for that"
        )
        raise Unsupported(message)
    return (f"{EP_V2} is unset: {release} prefers MoRI's second API and falls back to EPv1, as here: {reason}",)


def _fall_back(environ: Mapping[str, str], case: Case) -> str:
    """Reason of the fall-back, in SGLang's order; empty for none. No case is of gfx1250, which spans hosts."""
    ranks = case.tp_size or case.ep_size
    if ranks > _HOST_RANKS:
        return f"{ranks} ranks are more than one host's {_HOST_RANKS}"
    if environ.get(_USE_AITER, "").lower() not in EP_V2_WORDS[0]:
        return f"{_USE_AITER} is off"
    if sglang_enables(environ.get(SDMA, "")):
        return f"{SDMA} is on"
    return "" if case.model == _VALIDATED else f"model {case.model} is not {_VALIDATED}"
