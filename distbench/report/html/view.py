"""The part of a report that a page shows; a key that older reports lack has a default."""

from __future__ import annotations

from typing import Any

import msgspec

from distbench.errors import InvalidCase
from distbench.report.findings import ErrorReport
from distbench.report.schema import (
    CallerReport,
    CaseView,
    ComparisonReport,
    DifferingReport,
    InjectedReport,
    RateReport,
)
from distbench.utils.text import one_line
from distbench.verify.records import Divergence, SentRows


class PicturedRank(msgspec.Struct, frozen=True, kw_only=True):
    """One rank: its traffic, and the kernel of each arm."""

    rank: int
    host: str
    device: str
    total_recv: int
    tokens: int = 0
    capacity: int = 0
    limit: int | None = None
    lost_rows: int = 0
    kernels: dict[str, dict[str, Any]] = {}


class PicturedLost(msgspec.Struct, frozen=True, kw_only=True):
    """Rows at and past the limit, the first tokens as (source rank, source token)."""

    rows: int
    tokens: list[tuple[int, int]] = []
    by_rank: dict[str, int] = {}


class Pictured(CaseView, frozen=True, kw_only=True):
    """The report of a case as its page shows it."""

    ranks: list[PicturedRank]
    lost: PicturedLost
    sources: dict[str, str] = msgspec.field(default_factory=dict)
    warnings: list[str] = msgspec.field(default_factory=list)
    transport: dict[str, Any] = msgspec.field(default_factory=dict)
    comparison: list[ComparisonReport] = msgspec.field(default_factory=list)
    errors: list[ErrorReport] = msgspec.field(default_factory=list)
    first_divergence: Divergence | None = None
    stacks: dict[str, str] = msgspec.field(default_factory=dict)
    injected: list[InjectedReport] = msgspec.field(default_factory=list)
    rate: RateReport | None = None
    sent: SentRows | None = None
    differing: DifferingReport | None = None
    caller: CallerReport | msgspec.UnsetType = msgspec.UNSET


def pictured(raw: bytes) -> Pictured:
    """The report in one line of a journal.

    Raises:
        InvalidCase: a key has another type than reports have.

    """
    try:
        return msgspec.json.decode(raw, type=Pictured)
    except (ValueError, RecursionError) as error:
        message = f"report html: {one_line(error)}; give results that distbench wrote"
        raise InvalidCase(message) from error
