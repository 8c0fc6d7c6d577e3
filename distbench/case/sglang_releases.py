"""Release-dependent rules of SGLang's MoRI path: the variables that it reads, their values, its receive bound.

Read in the wheels 0.5.9 to 0.5.23 (`token_dispatcher/moriep.py`, `moe_runner/aiter.py`, `environ.py`), each of them
for each rule: docs/production.md has the table.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec
from packaging.version import Version

from distbench.errors import InvalidCase
from distbench.utils.versions import release_of

NEWEST = "0.5.23"
"""The newest release whose source was read; later ones are assumed to be like it."""
FIRST = "0.5.9"
"""The first release with a MoRI path."""

LIMIT = "SGLANG_MORI_MOE_MAX_INPUT_TOKENS"
DISPATCH_TOKENS = "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
PREALLOC = "SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS"
RECV_BOUND = "SGLANG_MORI_RECV_BOUND"
KERNEL_SWITCH = "SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD"
DISPATCH_DTYPE = "SGLANG_MORI_DISPATCH_DTYPE"
COMBINE_DTYPE = "SGLANG_MORI_COMBINE_DTYPE"
FP8_DISPATCH = "SGLANG_MORI_FP8_DISP"
FP4_DISPATCH = "SGLANG_MORI_FP4_DISP"
FP8_COMBINE = "SGLANG_MORI_FP8_COMB"
EP_V2 = "SGLANG_MORI_EP_V2"
SDMA = "MORI_ENABLE_SDMA"
EP_V2_WORDS = ("true", "1", "yes", "y"), ("false", "0", "no", "n")
"""Words for on and for off, as SGLang's `EnvBool` reads them."""
_YES = ("true", "1")
_OFF_WORDS = ("0", "false", "off", "no")


class Span(NamedTuple):
    """The first and the last release that reads a variable; no last one: the newest reads it."""

    first: str
    last: str = ""

    def __str__(self) -> str:
        """The span as text."""
        return f"{self.first} to {self.last}" if self.last else f"{self.first} and later"


VARIABLES: dict[str, Span] = {
    LIMIT: Span("0.5.11"),
    DISPATCH_TOKENS: Span("0.5.9"),
    PREALLOC: Span("0.5.11"),
    RECV_BOUND: Span("0.5.19"),
    KERNEL_SWITCH: Span("0.5.9"),
    DISPATCH_DTYPE: Span("0.5.10"),
    COMBINE_DTYPE: Span("0.5.12"),
    FP8_DISPATCH: Span("0.5.9", "0.5.20"),
    FP4_DISPATCH: Span("0.5.10", "0.5.20"),
    FP8_COMBINE: Span("0.5.10", "0.5.20"),
    EP_V2: Span("0.5.22"),
    SDMA: Span("0.5.11"),
    "SGLANG_MORI_NO_PAD_MASK": Span("0.5.15"),
}
"""The variables of the expert-parallel path by the releases that read them."""

TRANSFER_VARIABLES = frozenset(
    f"SGLANG_MORI_{name}"
    for name in (
        *("QP_PER_TRANSFER", "POST_BATCH_SIZE", "NUM_WORKERS", "TRANSFER_SHARDS", "WAIT_POLL_MS"),
        *("TRANSFER_TIMEOUT_MS", "SEND_AUX_RDMA", "USE_XGMI"),
    )
)
"""Variables of the KV-cache transfer, which expert parallelism does not read."""


class SglangRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one generation of releases."""

    recv_bound: Literal["", "routes", "senders"] = ""
    """SGLANG_MORI_RECV_BOUND cuts at nothing, at the sum of tokens times top-k, or at that of tokens, rounded up."""
    yes_words: tuple[str, ...] = _YES
    no_words: tuple[str, ...] = ("false", "0")
    """Valid values of SGLANG_MORI_RECV_BOUND, in lower case; others leave it off, with a warning."""
    dispatch_words: tuple[str, ...] = ("auto", "bf16", "fp8", "fp4")
    combine_words: tuple[str, ...] = ()
    fp8_combine: Literal["none", "fp8_direct_cast", "fp8_blockwise"] = "none"
    """Quantisation of combine under SGLANG_MORI_FP8_COMB=true."""
    clamps_grid: bool = False
    """IntraNode's blocks are clamped to the device's compute units (`init_mori_op`): more of them can hang."""


def _generations() -> dict[str, SglangRules]:
    changed = msgspec.structs.replace
    rules = {"0.5.9": SglangRules(dispatch_words=())}
    rules["0.5.10"] = SglangRules(fp8_combine="fp8_direct_cast")
    rules["0.5.12"] = SglangRules(combine_words=("auto", "bf16", "fp8", "fp8_direct_cast"), fp8_combine="fp8_blockwise")
    rules["0.5.16"] = changed(rules["0.5.12"], combine_words=("auto", "bf16", "fp8", "fp8_direct_cast", "fp4"))
    words = ("auto", "bf16", "fp8", "fp4", "mxfp8")
    rules["0.5.19"] = changed(rules["0.5.16"], recv_bound="routes", dispatch_words=words)
    rules["0.5.21"] = changed(rules["0.5.19"], fp8_combine="none", clamps_grid=True)
    rules["0.5.22"] = changed(
        rules["0.5.21"], recv_bound="senders", yes_words=("true", "1", "yes", "y"), no_words=("false", "0", "no", "n")
    )
    return rules


SGLANG_RULES = _generations()
"""The rules by the first release that has them, oldest first."""


def rules_of(version: str) -> SglangRules:
    """Rules of an SGLang release; of the newest for "".

    Raises:
        InvalidCase: not a version, or one without a MoRI path.

    """
    wanted = _key(version or NEWEST)
    known = [name for name in SGLANG_RULES if _key(name) <= wanted]
    if not known:
        message = (
            f"sglang_version = {version!r}: SGLang has a MoRI path since {FIRST}; give that release or a later one"
        )
        raise InvalidCase(message)
    return SGLANG_RULES[known[-1]]


def reads(name: str, version: str) -> bool:
    """Whether the release reads the variable `name`, one of `VARIABLES`."""
    span, wanted = VARIABLES[name], _key(version or NEWEST)
    return _key(span.first) <= wanted and (not span.last or wanted < _next(span.last))


def enables(text: str) -> bool:
    """Whether MoRI reads `text` as on: anything but the empty text, 0, false, off and no (`IsEnvVarEnabled`)."""
    return bool(text) and text.lower() not in _OFF_WORDS


def sglang_enables(text: str) -> bool:
    """Whether SGLang reads `text` as on (`get_bool_env_var`)."""
    return text.lower() in _YES


def _next(version: str) -> Version:
    """Key of the release after `version`, so that its post releases belong to it."""
    head, _, last = version.rpartition(".")
    return _key(f"{head}.{int(last) + 1}.dev0")


def _key(version: str) -> Version:
    key = release_of(version)
    if key is None:
        message = f"sglang_version = {version!r:.80}: no release; give one such as {NEWEST}"
        raise InvalidCase(message)
    return key
