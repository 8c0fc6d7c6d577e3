"""Records of a case: observations of ranks, findings of rank 0, judgement. No tensors, no torch."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from distbench.callers.text import CallerUse
from distbench.case.limits import LimitProof, Traffic, prove_limit
from distbench.case.spec import Case
from distbench.case.stages import SUB_BATCHES, Arm, Stage
from distbench.errors import Verdict
from distbench.utils.devices import DeviceState
from distbench.utils.text import counted

ORACLE = "oracle"
LISTED_TOKENS = 64
MAP_TOKENS, MAP_COLUMNS = 64, 32
COUNTS = ("capacity", "total_recv")
RETURNED = "the sum of what ranks returned"
FINITE = "finite values"
POISON = "poison or NaN"
SCATTERED = "other values"
ANOTHER_ROW = "another token's row"
MULTIPLIED = "multiplied by"
SEVERAL = "several faults at once"
NOT_PROVEN = "limit-not-proven"
"""Code of the note on a PASS whose limit may lose rows under another routing with the same token counts."""


class RowComparison(msgspec.Struct, frozen=True):
    """Differences of two tensors of one shape [n, H], bit for bit.

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
    """A wrongly received row: its (source rank, source token), a digest of all fields, and all its receivers."""

    token: tuple[int, int]
    bits: int
    receivers: list[int]


class Evidence(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Properties that the wrong rows of one stage share, as far as the rank itself can see.

    `tokens` are the first 64 as (source rank, source token), `fields` the wrong fields. For tokens: of those
    `examined`, `suspects` are the ranks of which each explains them all, and `by_destination` counts how many have a
    row on each rank. For received rows: the number from each source rank, and the first 64 of them.
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
    """The first place where a stage of one pass on one rank is wrong.

    `row` is the slot in the receive buffer (dispatch, experts) or the token (combine). `against` names the reference:
    the source, the oracle, the padded arm, or the sum of the returned rows. `rows` counts the wrong rows of this stage.
    `far` counts those further from the padded arm's than any rounding explains. `sub_batch` names the sub-batches of
    two-batch overlap that it concerns, "A", "B" or "A and B"; source tokens are numbered in the whole batch.
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
    sub_batch: str = ""
    evidence: Evidence = msgspec.field(name="clues", default_factory=Evidence)

    @property
    def proven(self) -> bool:
        """Whether it is wrong whatever the kernel, and not merely different from the padded arm's bits."""
        return self.against != Arm.PADDED

    def __str__(self) -> str:
        """Return one line: rank, arm, number of rows, and the first row."""
        return self.line(self.arm)

    def line(self, arm: str) -> str:
        """Return the line with another name of the arm."""
        if self.sub_batch:
            arm = f"{arm}, sub-batch {self.sub_batch}"
        source = "" if self.source_token is None else f", first token {self.source_token} of rank {self.source_rank}"
        if self.stage == Stage.TRUNCATE and self.field == "rows":
            return f"rank {self.rank}, {arm}: {counted(self.rows, 'received row')} did not reach the experts{source}"
        if self.field in COUNTS:
            distance = f"{self.field} differs by {counted(self.rows, 'row')} from {self.against}"
            return f"rank {self.rank}, {arm}, {self.stage}: {distance}"
        bits = "" if self.column is None else f", column {self.column}: {self.actual_bits} not {self.expected_bits}"
        what = f"{self.field} differ from {self.against} in {counted(self.rows, 'row')}"
        blame = (
            f"; {self.evidence.pattern}: rank {' or '.join(map(str, self.evidence.suspects))}"
            if self.evidence.suspects
            else ""
        )
        return f"rank {self.rank}, {arm}, {self.stage}: {what}{source}{bits}{blame}"


class LostRows(msgspec.Struct, frozen=True):
    """Rows of one rank's receive buffer at and past the limit: their number, and the first sources in slot order."""

    rows: int = 0
    tokens: list[tuple[int, int]] = []


class FloatError(msgspec.Struct, frozen=True):
    """The worst error against the float reference, as a share of the token's largest magnitude; None with a NaN."""

    worst: float | None
    tokens: int


class ArmError(msgspec.Struct, frozen=True, kw_only=True):
    """Error of one arm at one stage on one rank against float64, with the error of ideal roundings.

    `stage` is "experts" (rows that this rank's experts returned) or "combine" (this rank's tokens). `family` names the
    ideal: the roundings that the kernel's own format demands, in the order in which its family makes them.

    `rows` is the number of sampled rows [n, H] that were judged; rows of a token that lost a row to the cut are left
    out. `nan_rows` of them hold a NaN or an infinity where float64 holds none. `ratio` is the rms error over the
    ideal's, `bias` the z score of the mean signed error less the ideal's; both are None where `nan_rows` is not 0.
    `worst` and `ideal_worst` are the largest error of a row, as a share of the row's largest magnitude. `allowed` holds
    the bounds of this sample: `ratio_low`, `ratio_high`, `bias`, `worst`. `within` says that all of them hold.
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
    layer. `last` compares the output of the last iteration with that of the checked pass, and `drift` is their distance
    as a share of a token's largest magnitude, None with a NaN. `flushed_bytes` were written before each iteration to
    flush the caches; 0 where they stay warm. `peak_device_bytes` is torch's peak memory on the device meanwhile, None
    on the CPU. `error` is that of the last iteration's tokens, where inputs are gaussian and no row was lost; `apart`
    is the bound on `drift` there.
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
    """A graph's replay with `live` rows of other tokens: wrong rows, and rows whose bits differ by a rounding only.

    The latter come from kernels that add atomically, where inputs are not exact, and are within what two
    runs of the kernel may differ by.
    """

    live: int
    wrong: int
    near: int = 0


class LayerGraph(msgspec.Struct, frozen=True, kw_only=True):
    """Replays of an arm's layer in one graph, on one rank, each with tokens of its own.

    `skipped` would have sent a rank more rows than the arm keeps. `host_us` is the median time of the host in a replay,
    `device_us` that of the device.
    """

    arm: str
    replays: list[Replay]
    skipped: int
    host_us: float
    device_us: float


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Number of tokens compared with a reference, over all passes, and how many were wrong."""

    tokens: int = 0
    wrong: int = 0
    repeats: int = 0

    def plus(self, tokens: int, wrong: int) -> TokenCounts:
        """Add counts of tokens and wrong tokens."""
        return TokenCounts(tokens=self.tokens + tokens, wrong=self.wrong + wrong, repeats=self.repeats)


class CellGrid(msgspec.Struct, frozen=True):
    """Cells of a map of the tokens of all ranks, in order, by columns: tokens and columns of a cell."""

    tokens: int
    columns: int


def cell_grid(tokens: int, columns: int) -> CellGrid:
    """The finest grid of at most MAP_TOKENS x MAP_COLUMNS cells."""
    return CellGrid(max(-(-tokens // MAP_TOKENS), 1), max(-(-columns // MAP_COLUMNS), 1))


class DifferingCells(msgspec.Struct, frozen=True, array_like=True):
    """Differing elements of one rank's tokens by cell: `counts` of consecutive rows of the map, from row `first` on."""

    first: int
    counts: list[list[int]]


class Survivors(msgspec.Struct, frozen=True):
    """One rank's tokens that lost no row to a limit below total_recv: their damage is not due to the limit.

    `nan_tokens[arm]` counts those with a NaN, `differing[pair]` those that differ between two arms.
    """

    nan_tokens: dict[str, int]
    differing: dict[str, int]


class SubBatchCounts(msgspec.Struct, frozen=True, kw_only=True):
    """One sub-batch on one rank: its tokens, the rows it receives, and the rows M given to the experts, by arm."""

    name: str
    tokens: int
    total_recv: int
    rows: dict[str, int]


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's findings.

    `distance[arm]` is the arm's distance from padded, as a share of a token's largest magnitude, None with a NaN or an
    infinity; tokens that lost a row to the limit are left out. `drift` is the truncated arm's in records that have no
    `distance`. `nan_tokens[arm]` counts tokens with a NaN. `survivors` is None where the limit takes no row away.
    `durations_us[arm][stage]` has one entry for each repeat, the first 4096; `packages` holds the adapters' facts about
    their packages; `injected` counts the changes here by each injected fault, by its index in the case's list. `timed`
    has the timed arms, `device_state` the device's state while the last of them ran. `replays` are replays of the last
    arm's graph with other tokens. `errors` measure arms and stages where inputs are gaussian. `accepted` lists, by the
    index of an injected mutant, the public acceptance rules that accept this rank's tokens. `caller` is that of the arm
    production, where the case has one. `sub_batches` are those of two-batch overlap. `difference_map[pair]` counts
    the differing elements of a pair that is not equal.
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
    token_counts: TokenCounts = msgspec.field(name="exposure")
    injected: dict[str, int]
    nan_tokens: dict[str, int]
    durations_us: dict[str, dict[str, list[float]]]
    transport: dict[str, Any]
    peak_bytes: int
    packages: dict[str, Any]
    timed: dict[str, Timed] = {}
    device_state: DeviceState | None = None
    replays: list[Replay] = []
    layer_graphs: list[LayerGraph] = []
    errors: list[ArmError] = []
    accepted: dict[str, dict[str, bool]] = {}
    caller: CallerUse | None = None
    sub_batches: list[SubBatchCounts] = []
    difference_map: dict[str, DifferingCells] = {}

    def distance_of(self, arm: str) -> float | None:
        """Distance of `arm` from padded; 0 where that was not measured."""
        if arm == Arm.TRUNCATED and not self.distance:
            return self.drift
        return self.distance.get(arm, 0.0)


class Gathered(msgspec.Struct, frozen=True):
    """All ranks' records on rank 0, and its own comparison of their outputs.

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

    def arm_name(self, arm: str) -> str:
        """The arm's name in messages: production with the release of the caller's code."""
        caller = self.observations[0].caller if arm == Arm.PRODUCTION and self.observations else None
        return arm if caller is None else f"{arm} ({caller.text.label})"


class Reason(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One finding behind a verdict; `code` is stable, `message` is for people, `stage` is where the fault was found."""

    code: str
    message: str
    rank: int | None = None
    stage: str = ""


class ResolvedCase(msgspec.Struct, frozen=True):
    """A case with the traffic that its routing makes and the rows to cut to; None for no cut.

    `sub_batches` is the traffic of each sub-batch of two-batch overlap, empty without it.
    """

    case: Case
    traffic: Traffic
    limit: int | None
    sub_batches: tuple[Traffic, ...] = ()

    @property
    def per_call(self) -> Traffic:
        """Traffic that the limit and the receive buffer have to hold: of one dispatch, at most, on each rank."""
        if not self.sub_batches:
            return self.traffic
        first, second = self.sub_batches
        tokens, received = map(max, first.tokens, second.tokens), map(max, first.total_recv, second.total_recv)
        return Traffic(tuple(tokens), tuple(received), self.traffic.capacity)

    @property
    def short_ranks(self) -> list[int]:
        """Ranks that receive more rows than the limit keeps."""
        if self.limit is None:
            return []
        return [rank for rank, rows in enumerate(self.per_call.total_recv) if rows > self.limit]

    @property
    def proof(self) -> LimitProof:
        """Traffic for which the limit loses no row: any routing of these token counts, or only this batch."""
        return prove_limit(self.limit, self.per_call)

    @property
    def lossy(self) -> bool:
        """Whether the case asks for lost rows: the limit is below total_recv on some rank, and the cut is made."""
        return self.case.policy == "unchecked" and bool(self.short_ranks)

    def asks_for(self, found: Divergence) -> bool:
        """Whether the case itself asks for this loss: exactly the rows past a limit below the rank's total_recv."""
        if self.limit is None or (found.stage, found.field) != (Stage.TRUNCATE, "rows"):
            return False
        traffic = self.sub_batches[SUB_BATCHES.index(found.sub_batch)] if found.sub_batch else self.traffic
        return found.rank in self.short_ranks and found.rows == traffic.total_recv[found.rank] - self.limit

    @property
    def refused(self) -> bool:
        """Whether policy strict forbids the cut, on all ranks together."""
        return self.case.policy == "strict" and bool(self.short_ranks)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One rule that applied: its verdict, its reasons, and the inputs (exact or gaussian)."""

    verdict: Verdict
    inputs: str
    reasons: list[Reason]


class Judgement(msgspec.Struct, frozen=True):
    """The verdict of a case, its grounds, and the first wrong place.

    `findings` are all rules that applied, the most fundamental first: verdict and reasons are those of the first, and
    those of a PASS are its notes. There are none where a case was refused or lost its ranks.
    """

    verdict: Verdict
    reasons: list[Reason]
    first_divergence: Divergence | None
    findings: list[Finding] = []


Token = tuple[int, int]


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One cause that fits the evidence: `stage` and `ranks` of its origin, and the first 64 (source rank, token)."""

    cause: str
    confidence: Literal["certain", "likely"]
    evidence: str
    stage: str = ""
    ranks: list[int] = []
    tokens: list[Token] = []


class SentRows(msgspec.Struct, frozen=True, kw_only=True):
    """Rows sent in one dispatch: `rows[i][j]` from block i of consecutive ranks to block j.

    A block has `ranks_per_block` ranks, 1 where the table of all ranks fits into a report; the last may have fewer.
    """

    ranks_per_block: int
    rows: list[list[int]]


class Outcome(msgspec.Struct, frozen=True):
    """End of a case. Nothing was gathered where it was refused before its first dispatch, or lost its ranks.

    `sent` is known where all ranks ran. `stacks` holds the Python stacks of ranks, by rank, where they show the reason.
    """

    case: Case
    judgement: Judgement
    resolved: ResolvedCase | None = None
    gathered: Gathered | None = None
    diagnosis: list[Diagnosis] = []
    stacks: dict[str, str] = {}
    sent: SentRows | None = None
