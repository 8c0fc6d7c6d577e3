"""The records that a case leaves: what ranks saw, what rank 0 found, how it was judged. No tensors, no torch."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from distbench.case import Case
from distbench.devices import DeviceState
from distbench.errors import Verdict
from distbench.limits import LimitProof, Traffic, prove_limit

STAGE_ORDER = ("dispatch", "truncate", "experts", "combine")
ORACLE = "oracle"
LISTED_TOKENS = 64
COUNTS = ("capacity", "total_recv")
RETURNED = "the sum of what ranks returned"
PADDED = "padded"
FINITE = "finite values"
POISON = "poison or NaN"
SCATTERED = "other values"
ANOTHER_ROW = "another token's row"
MULTIPLIED = "multiplied by"
SEVERAL = "several faults at once"
NOT_PROVEN = "limit-not-proven"
"""Code of the note on a PASS whose limit may lose rows under another routing of the same token counts."""


class RowComparison(msgspec.Struct, frozen=True):
    """How two tensors of one shape [n, H] differ, bit for bit.

    `max_ulp` is the largest distance of two differing elements in units in the last place (steps between neighbouring
    floats of the type, sign and NaN patterns included).
    """

    differing_tokens: int
    differing_elements: int
    max_ulp: int

    @property
    def equal(self) -> bool:
        """Whether every bit is the same."""
        return self.differing_elements == 0

    def plus(self, other: RowComparison) -> RowComparison:
        """Return the comparison of both parts together."""
        return RowComparison(
            self.differing_tokens + other.differing_tokens,
            self.differing_elements + other.differing_elements,
            max(self.max_ulp, other.max_ulp),
        )


NO_DIFFERENCE = RowComparison(0, 0, 0)


class WrongRow(msgspec.Struct, frozen=True, array_like=True):
    """A row received wrong: its (source rank, source token), a digest of all fields, and all ranks that receive it."""

    token: tuple[int, int]
    bits: int
    receivers: list[int]


class Clues(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the wrong rows of one stage have in common, as far as the rank itself can see.

    `tokens` are the first 64 as (source rank, source token), `fields` those that are wrong. For tokens: of those
    `examined`, `suspects` are ranks of which each explains them all, `by_destination` how many have a row on each rank.
    For received rows: how many came from each source rank, and the first 64 of them.
    """

    pattern: str = ""
    tokens: list[tuple[int, int]] = []
    fields: list[str] = []
    suspects: list[int] = []
    examined: int = 0
    by_destination: dict[str, int] = {}
    by_source: dict[int, int] = {}
    received: list[WrongRow] = []


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """The first place where a stage of one pass on one rank is not what it should be.

    `row` is the slot in the receive buffer (dispatch, experts) or the token (combine); `against` says what it was
    compared with: the source, the oracle, the padded arm, or the sum of what ranks returned. `rows` counts the rows of
    this stage that are wrong. `far` counts those that are further from the padded arm's than any rounding takes them.
    """

    stage: str
    arm: str
    rank: int
    source_rank: int | None = None
    source_token: int | None = None
    row: int | None = None
    column: int | None = None
    expected_bits: str | None = None
    actual_bits: str | None = None
    field: str
    against: str
    rows: int
    far: int = 0
    clues: Clues = msgspec.field(default_factory=Clues)

    @property
    def proven(self) -> bool:
        """Whether it is wrong whatever the kernel, not only other bits than the padded arm has."""
        return self.against != PADDED

    def __str__(self) -> str:
        """Return one line: which rank and arm, how many rows, and the first of them."""
        source = "" if self.source_token is None else f", first token {self.source_token} of rank {self.source_rank}"
        if self.stage == "truncate" and self.field == "rows":
            return f"rank {self.rank}, {self.arm}: {self.rows} received rows did not reach the experts{source}"
        if self.field in COUNTS:
            return (
                f"rank {self.rank}, {self.arm}, {self.stage}: {self.field} is {self.rows} rows away from {self.against}"
            )
        bits = "" if self.column is None else f", column {self.column}: {self.actual_bits} not {self.expected_bits}"
        what = f"{self.field} differ from {self.against} in {self.rows} rows"
        blame = (
            f"; {self.clues.pattern}: rank {' or '.join(map(str, self.clues.suspects))}" if self.clues.suspects else ""
        )
        return f"rank {self.rank}, {self.arm}, {self.stage}: {what}{source}{bits}{blame}"


class LostRows(msgspec.Struct, frozen=True):
    """Rows of one rank's receive buffer at and past the limit: how many, and the first sources, in slot order."""

    rows: int = 0
    tokens: list[tuple[int, int]] = []


class FloatError(msgspec.Struct, frozen=True):
    """The worst error against the float reference, as a share of the token's largest magnitude; None with a NaN."""

    worst: float | None
    tokens: int


class ArmError(msgspec.Struct, frozen=True, kw_only=True):
    """Error of one arm at one stage on one rank, against float64, beside the error of ideal roundings.

    `stage` is "experts" (rows that this rank's experts returned) or "combine" (this rank's tokens). `family` names the
    ideal: the roundings that the kernel's own format demands, in the order in which its family makes them.

    `rows` are the sampled rows [n, H] that were judged; rows of a token that lost a row to the cut are left out.
    `nan_rows` of them hold a NaN or an infinity where float64 holds none. `ratio` is the rms error over the ideal's,
    `bias` the z score of the mean signed error less the ideal's; both are None where `nan_rows` is not 0. `worst` and
    `ideal_worst` are the largest error of a row, as a share of the row's largest magnitude. `allowed` holds the bounds
    of this sample: `ratio_low`, `ratio_high`, `bias`, `worst`. `within` says that all of them hold.
    """

    arm: str
    stage: str
    family: str
    rows: int
    nan_rows: int
    ratio: float | None
    bias: float | None
    worst: float | None
    ideal_worst: float
    allowed: dict[str, float]
    within: bool


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """The timed iterations of one arm on one rank, in microseconds.

    `slowest_us[stage]` has the slowest rank of each iteration, alike on all ranks; `layer_us` is this rank's own whole
    layer. `last` compares the output of the last iteration with that of the checked pass, and `drift` is how far it is
    from there, as a share of a token's largest magnitude, None with a NaN. `flushed_bytes` were written before each
    iteration to empty the caches, 0 where they stay warm. `peak_device_bytes` is the most that torch held on the device
    meanwhile, None on the CPU. `error` is that of the last
    iteration's tokens, where inputs are gaussian and no row was lost, `apart` how large `drift` may be there.
    """

    slowest_us: dict[str, list[float]]
    layer_us: list[float]
    last: RowComparison
    drift: float | None
    flushed_bytes: int
    peak_device_bytes: int | None
    error: ArmError | None = None
    apart: float | None = None


class Replay(msgspec.Struct, frozen=True, array_like=True):
    """A graph's replay with `live` rows of other tokens: rows that are wrong, and that have other bits by a rounding.

    The latter are of kernels that add atomically, where inputs are not exact, and within the tolerance.
    """

    live: int
    wrong: int
    near: int = 0


class Exposure(msgspec.Struct, frozen=True, kw_only=True):
    """Results of tokens that were held against what they must be, over all passes, and how many were wrong."""

    tokens: int = 0
    wrong: int = 0
    repeats: int = 0

    def plus(self, tokens: int, wrong: int) -> Exposure:
        """Return it with so many tokens more."""
        return Exposure(tokens=self.tokens + tokens, wrong=self.wrong + wrong, repeats=self.repeats)


class Survivors(msgspec.Struct, frozen=True):
    """One rank's tokens that lost no row to a limit below total_recv: what is wrong with them is not the limit's doing.

    `nan_tokens[arm]` counts those with a NaN, `differing[pair]` those that differ between two arms.
    """

    nan_tokens: dict[str, int]
    differing: dict[str, int]


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's findings.

    `distance[arm]` is how far an arm is from padded, as a share of a token's largest magnitude, None with a NaN or an
    infinity; tokens that lost a row to the limit are left out. `drift` is the truncated arm's in records that have no
    `distance`. `nan_tokens[arm]` counts tokens with a NaN. `survivors` is None where the limit takes no row away.
    `durations_us[arm][stage]` has one entry for each repeat, the first 4096; `packages` is what adapters say of theirs;
    `injected` counts what each injected fault, by its place in the case's list, has changed here. `timed` has the arms
    that were timed, `device_state` the device while the last of them ran on. `replays` are those of the last arm's
    graph with other tokens. `errors` measure arms and stages where inputs are gaussian.
    `accepted` says, by the place of an injected mutant, which public acceptance rules accept this rank's tokens.
    """

    rank: int
    host: str
    device: str
    tokens: int
    total_recv: int
    capacity: int
    limit: int | None
    lost: LostRows
    kernels: dict[str, dict[str, Any]]
    digests: dict[str, str]
    divergences: list[Divergence]
    comparisons: dict[str, RowComparison]
    reference: FloatError | None
    drift: float | None = None
    distance: dict[str, float | None] = {}
    survivors: Survivors | None = None
    exposure: Exposure
    injected: dict[str, int]
    nan_tokens: dict[str, int]
    durations_us: dict[str, dict[str, list[float]]]
    transport: dict[str, Any]
    peak_bytes: int
    packages: dict[str, Any]
    timed: dict[str, Timed] = {}
    device_state: DeviceState | None = None
    replays: list[Replay] = []
    errors: list[ArmError] = []
    accepted: dict[str, dict[str, bool]] = {}

    def distance_of(self, arm: str) -> float | None:
        """How far `arm` is from padded; 0 where that was not measured."""
        if arm == "truncated" and not self.distance:
            return self.drift
        return self.distance.get(arm, 0.0)


class Gathered(msgspec.Struct, frozen=True):
    """What rank 0 holds of all ranks: their records, and its own comparison of their outputs.

    `differing[pair]` lists the first differing tokens as (rank, token). `disputed` names ranks whose own comparison
    disagrees with that of rank 0. `peak_bytes` is rank 0's largest resident size, gathering included. `gaussian` is the
    part with gaussian inputs of a case that runs with both.
    """

    observations: list[Observation]
    comparisons: dict[str, RowComparison]
    differing: dict[str, list[tuple[int, int]]]
    disputed: list[int]
    mode: str
    peak_bytes: int
    gaussian: Gathered | None = None


class Reason(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One finding behind a verdict; `code` is stable, `message` is for people, `stage` is where it was found."""

    code: str
    message: str
    rank: int | None = None
    stage: str = ""


class Question(msgspec.Struct, frozen=True):
    """What is asked of a case: the traffic that the routing makes, the rows to cut to, or None where none are cut."""

    case: Case
    traffic: Traffic
    limit: int | None

    @property
    def short_ranks(self) -> list[int]:
        """Ranks that receive more rows than the limit keeps."""
        if self.limit is None:
            return []
        return [rank for rank, rows in enumerate(self.traffic.total_recv) if rows > self.limit]

    @property
    def proof(self) -> LimitProof:
        """The traffic for which the limit loses no row: any routing of these token counts, or this batch at most."""
        return prove_limit(self.limit, self.traffic)

    @property
    def lossy(self) -> bool:
        """Whether the case asks for lost rows: the limit is below total_recv on some rank, and cuts all the same."""
        return self.case.policy == "unchecked" and bool(self.short_ranks)

    def asks_for(self, found: Divergence) -> bool:
        """Whether the case itself asks for this loss: the rows past a limit below what the rank receives, no others."""
        if self.limit is None or (found.stage, found.field) != ("truncate", "rows"):
            return False
        return found.rank in self.short_ranks and found.rows == self.traffic.total_recv[found.rank] - self.limit

    @property
    def refused(self) -> bool:
        """Whether policy strict forbids the cut, on all ranks together."""
        return self.case.policy == "strict" and bool(self.short_ranks)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One rule that struck: the verdict that it stands for, its reasons, and the inputs (exact or gaussian)."""

    verdict: Verdict
    inputs: str
    reasons: list[Reason]


class Judgement(msgspec.Struct, frozen=True):
    """The verdict of a case, what led to it, and the first place that went wrong.

    `findings` are all rules that struck, the most fundamental first: verdict and reasons are that one's, and those of a
    PASS its notes. There are none where a case was refused or lost its ranks.
    """

    verdict: Verdict
    reasons: list[Reason]
    first_divergence: Divergence | None
    findings: list[Finding] = []


Token = tuple[int, int]


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One cause that fits what was seen: `stage` and `ranks` where it began, the first 64 (source rank, token)."""

    cause: str
    confidence: Literal["certain", "likely"]
    evidence: str
    stage: str = ""
    ranks: list[int] = []
    tokens: list[Token] = []


class Outcome(msgspec.Struct, frozen=True):
    """How a case ended. Nothing was gathered where it was refused before its first dispatch, or lost its ranks.

    `stacks` holds the Python stacks of ranks, by rank, where they tell why.
    """

    case: Case
    judgement: Judgement
    question: Question | None = None
    gathered: Gathered | None = None
    diagnosis: list[Diagnosis] = []
    stacks: dict[str, str] = {}


def pairs_of(arms: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return which outputs are compared with which, in the order of the report. `arms` may end in the oracle."""
    wanted = [
        ("padded", ORACLE),
        ("padded", "control"),
        ("padded", "repadded"),
        ("repadded", "truncated"),
        ("padded", "truncated"),
    ]
    return [pair for pair in wanted if pair[0] in arms and pair[1] in arms]


def pair_name(pair: tuple[str, str]) -> str:
    """Return the key of a comparison."""
    return f"{pair[0]}/{pair[1]}"
