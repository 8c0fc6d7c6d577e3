"""Keys of report.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from distbench.errors import Verdict
from distbench.report.environment import NO_ENVIRONMENT, Environment
from distbench.report.findings import ErrorReport, FindingReport
from distbench.report.limit import LimitReport
from distbench.utils.devices import DeviceState
from distbench.verify.records import (
    Diagnosis,
    Divergence,
    LayerGraph,
    Reason,
    Replay,
    SentRows,
    SubBatchCounts,
)
from distbench.workload.version import InputsVersion

SCHEMA = "distbench.report/1"


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """One rank: its traffic, each arm's kernel and digest, its largest resident size before gathering, its packages.

    `sub_batches` has the traffic and M of each sub-batch, with two-batch overlap.
    """

    rank: int
    host: str
    device: str
    tokens: int
    total_recv: int
    capacity: int
    limit: int | None
    lost_rows: int
    kernels: dict[str, dict[str, Any]]
    digests: dict[str, str]
    peak_bytes: int
    packages: dict[str, Any]
    layer_us: dict[str, list[float]] = {}
    device_state: DeviceState | None = None
    replays: list[Replay] = []
    layer_graphs: list[LayerGraph] = []
    sub_batches: list[SubBatchCounts] = []


class ComparisonReport(msgspec.Struct, frozen=True, kw_only=True):
    """Two arms, compared by rank 0 over all ranks' tokens."""

    arms: tuple[str, str]
    equal: bool
    tokens: int
    differing_tokens: int
    differing_elements: int
    max_ulp: int


class DifferingReport(msgspec.Struct, frozen=True, kw_only=True):
    """Map of where two arms differ: `cells` has a text for each block of tokens, with a digit for each of columns.

    0 stands for no differing element, n from 1 to 8 for up to n eighths of a cell's elements. A cell has
    `tokens_per_cell` tokens of all ranks, in order, and `columns_per_cell` columns; the last ones may have fewer.
    """

    arms: tuple[str, str]
    tokens_per_cell: int
    columns_per_cell: int
    cells: list[str]


class LostReport(msgspec.Struct, frozen=True, kw_only=True):
    """Rows at and past the limit; `tokens` are (source rank, source token), the first 64."""

    rows: int
    tokens: list[tuple[int, int]]
    by_rank: dict[str, int]


class RateReport(msgspec.Struct, frozen=True, kw_only=True):
    """Wrong results of tokens over all passes, and per million, with the 95 % CI (Clopper and Pearson)."""

    repeats: int
    tokens: int
    wrong_tokens: int
    per_million: float
    low_per_million: float
    high_per_million: float


class InjectedReport(msgspec.Struct, frozen=True, kw_only=True):
    """A requested fault: its name, options, and its hits (times that it changed something) by rank.

    `needs` is the precondition of a hit, where there was none. `accepted` holds, for a mutant in the truncated arm and
    gaussian inputs, whether public acceptance rules accept the tokens of all ranks (docs/mutants.md). `stage` is that
    which a plugin's fault states.
    """

    name: str
    options: dict[str, str]
    hits: dict[str, int]
    needs: str = ""
    accepted: dict[str, bool] = {}
    stage: str = ""


class CallerReport(msgspec.Struct, frozen=True, kw_only=True):
    """Code of the arm production: the package, its release, the wheel or folder, the files in it, and SHA-256.

    `rows` are the rows M that it gave to `fused_moe`, by rank. `arguments` are those arguments of `fused_moe` that
    differ from distbench's own call on any rank: the caller's value and distbench's.
    """

    package: str
    version: str
    origin: str
    files: tuple[str, ...]
    sha256: str
    rows: dict[str, int]
    arguments: dict[str, tuple[str, str]]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document. A case that was refused or lost its ranks has no ranks and no comparison.

    `comparison`, `timing` and `rate` are those with exact inputs where a case runs with both kinds, `errors` those with
    gaussian ones. `findings` are all rules that fired, the verdict's first; `blind_spots` are the errors that exact
    inputs of this shape cannot show. `suite` names the suite of the case; `ended` is the time at which the report was
    written, in UTC as ISO 8601. `inputs_version` is that of the generated inputs; reports without it have 1. The arm
    production has a `caller`. `plugins` are the parts of other packages, such as transport acme. `sent` is None where
    no rank ran, and in older reports; `differing` also where all pairs are equal.
    """

    schema: str = SCHEMA
    inputs_version: InputsVersion = 1
    suite: str = ""
    name: str
    tags: tuple[str, ...]
    verdict: Verdict
    exit_code: int
    expect: str
    as_expected: bool
    reasons: list[Reason]
    findings: list[FindingReport] = []
    blind_spots: list[str] = []
    emulated: bool
    stand_ins: list[str]
    plugins: list[str] = []
    case: dict[str, Any]
    sources: dict[str, str]
    warnings: list[str]
    limit: LimitReport | None
    environment: Environment
    transport: dict[str, Any]
    ranks: list[RankReport]
    comparison: list[ComparisonReport]
    errors: list[ErrorReport] = []
    gather: str | None
    lost: LostReport
    first_divergence: Divergence | None
    diagnosis: list[Diagnosis]
    stacks: dict[str, str]
    injected: list[InjectedReport]
    rate: RateReport | None
    timing: dict[str, Any]
    ended: str = ""
    method: dict[str, Any] = {}
    memory: dict[str, Any]
    sent: SentRows | None = None
    differing: DifferingReport | None = None
    caller: CallerReport | msgspec.UnsetType = msgspec.UNSET


def parts_label(plugins: Iterable[str], stand_ins: Iterable[str]) -> str:
    """Parts of other packages, and stand-ins, in brackets after a blank; empty for none."""
    emulated = ", ".join(stand_ins)
    told = "; ".join(filter(None, (", ".join(plugins), f"emulated: {emulated}" if emulated else "")))
    return f" ({told})" if told else ""


class ReportView(msgspec.Struct, frozen=True, kw_only=True):
    """Base of structs that read part of a report, ignoring its other keys: the keys that every reader needs.

    A unit test holds keys and types of all views to those of `Report`. A view may have a default for a key that newer
    reports always have.
    """

    schema: str
    suite: str = ""
    name: str
    verdict: Verdict
    exit_code: int
    expect: str
    as_expected: bool
    limit: LimitReport | None


class CaseView(ReportView, frozen=True, kw_only=True):
    """Base of views that tell how a case ended, where, and what it measured; they add their part of the ranks."""

    tags: tuple[str, ...]
    reasons: list[Reason]
    emulated: bool
    stand_ins: list[str]
    plugins: list[str] = []
    case: dict[str, Any]
    diagnosis: list[Diagnosis]
    timing: dict[str, Any]
    ended: str = ""
    method: dict[str, Any] = {}
    environment: Environment = NO_ENVIRONMENT
