"""The table of a sweep: a row for each size and limit, read from the journal one report at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from distbench.case.limits import LimitProof
from distbench.case.stages import Arm, Stage
from distbench.report.bandwidth import bandwidth_of, shown
from distbench.report.journal import read_reports
from distbench.report.rank_table import label_beside
from distbench.report.schema import Report

COLUMNS = (
    "tokens", "limit", "rows", "safe", "kernel", "dispatch bus GB/s", "combine bus GB/s",
    "experts µs", "layer µs", "p99 µs", "padded / cut", "device GiB", "verdict",
)  # fmt: skip


class SweepRow(msgspec.Struct, frozen=True, kw_only=True):
    """One limit, at one size: `tokens` are those of each rank.

    Times are medians and p99 of the slowest rank, in microseconds, of the cut arm, or of padded for off. Bandwidths are
    in GB/s (docs/timing.md); the table has those of the bus. None where nothing was cut, as under an unsafe limit, or
    nothing was timed.
    """

    tokens: tuple[int, ...]
    limit: str
    rows: int | None
    safe: bool
    proof: LimitProof | None
    status: str
    kernel: str
    experts_us: float | None
    layer_us: float | None
    layer_p99_us: float | None
    dispatch_algorithm_gb_s: float | None
    dispatch_bus_gb_s: float | None
    combine_algorithm_gb_s: float | None
    combine_bus_gb_s: float | None
    padded_over_cut: float | None
    peak_device_bytes: int | None
    verdict: str
    notes: list[str]

    def cells(self) -> tuple[str, ...]:
        """The row's cells in the order of COLUMNS."""
        gib = "-" if self.peak_device_bytes is None else f"{self.peak_device_bytes / 2**30:.2f}"
        times = (_shown(self.experts_us, 1), _shown(self.layer_us, 1), _shown(self.layer_p99_us, 1))
        rows = "off" if self.rows is None else str(self.rows)
        ratio = _shown(self.padded_over_cut, 2)
        tokens = str(self.tokens[0]) if len(set(self.tokens)) == 1 else f"{sum(self.tokens)} in all"
        moved = (shown(self.dispatch_bus_gb_s), shown(self.combine_bus_gb_s))
        return (tokens, self.limit, rows, self.status, self.kernel, *moved, *times, ratio, gib, self.verdict)


def read_rows(out: Path, hashes: Sequence[str]) -> list[SweepRow]:
    """Rows of the cases with `hashes`, in this order; a case without a result has none."""
    found: dict[str, SweepRow] = {}
    for report in read_reports(out):
        if report.case["hash"] in hashes:
            found.setdefault(report.case["hash"], sweep_row(report))
    return [found[one] for one in hashes if one in found]


def sweep_row(report: Report) -> SweepRow:
    """The table's row for one report."""
    rows = None if report.limit is None else report.limit.effective
    arm = Arm.PADDED if rows is None else Arm.TRUNCATED
    timing = report.timing.get(arm, {}) if report.method else {}
    experts, layer = timing.get(Stage.EXPERTS), timing.get("layer")
    kernels = report.ranks[0].kernels if report.ranks else {}
    padded = report.timing[Arm.PADDED]["layer"]["median_us"] if layer else None
    memory = report.memory.get("device", {}).get(arm)
    dispatch, combine = (
        bandwidth_of(report, stage, timing[stage]["median_us"]) if stage in timing else None
        for stage in (Stage.DISPATCH, Stage.COMBINE)
    )
    return SweepRow(
        tokens=tuple(report.case["tokens"]),
        limit=report.case["limit"],
        rows=rows,
        safe=report.limit is None or report.limit.safe,
        proof=report.limit.proof if report.limit else None,
        status=report.limit.status if report.limit else "unknown",
        kernel=label_beside(kernels[arm], kernels[Arm.PADDED]) if arm in kernels else "not run",
        experts_us=experts["median_us"] if experts else None,
        layer_us=layer["median_us"] if layer else None,
        layer_p99_us=layer["p99_us"] if layer else None,
        dispatch_algorithm_gb_s=dispatch.algorithm if dispatch else None,
        dispatch_bus_gb_s=dispatch.bus if dispatch else None,
        combine_algorithm_gb_s=combine.algorithm if combine else None,
        combine_bus_gb_s=combine.bus if combine else None,
        padded_over_cut=round(padded / layer["median_us"], 3) if layer and padded else None,
        peak_device_bytes=memory["peak_bytes_max_over_ranks"] if memory else None,
        verdict=report.verdict.value + (" (emulated)" if report.emulated else ""),
        notes=[*report.warnings, *([f"times: {report.method['clock']}"] if report.method else [])],
    )


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
