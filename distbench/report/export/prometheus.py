"""A Prometheus text file, such as node_exporter's textfile collector reads.

Every series has the suite's name as a label: node_exporter refuses two files with the same series. Results of `run` and
`sweep` have the command's name there, and the label `case` tells two of them apart; it is empty for a suite. The other
labels take values from lists that the code fixes (verdicts, arms, stages), so the number of series does not depend on
the number of cases. One host only is a label, that of rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import BinaryIO, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distbench import __version__
from distbench.case.limits import Proof
from distbench.errors import Verdict
from distbench.report.document import ENDED
from distbench.report.export.totals import Totals, quantiles_of
from distbench.report.results import Results

_STATISTICS = ("median", "p99", "max")


def write(results: Results, file: BinaryIO) -> None:
    """Write gauges of the current results."""
    registry = CollectorRegistry()
    registry.register(_Collector(Totals(results)))
    file.write(generate_latest(registry))


class _Collector(Collector):
    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._whose = (totals.suite, totals.case_label)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        totals = self._totals
        info = self._family("distbench_info", "Always 1.", "version", "emulated", "host")
        emulated = "true" if totals.stand_ins else "false"
        info.add_metric((*self._whose, __version__, emulated, totals.first_host), 1)
        yield info
        yield self._by("verdict", "distbench_cases", "Cases by verdict.", _named(totals.verdicts))
        yield self._by(
            "verdict", "distbench_cases_unexpected", "Cases not as expected, by verdict.", _named(totals.unexpected)
        )
        text = "Cases by what their limit is safe for: any routing of their token counts, their batch only, or nothing."
        proofs = {proof: totals.limits[proof] for proof in get_args(Proof)}
        yield self._by("proof", "distbench_cases_by_limit", text, proofs)
        yield self._gauge("distbench_cases_missing", "Cases that have no result.", totals.missing)
        yield self._gauge("distbench_exit_code", "The exit code of all results together.", totals.exit_code)
        yield self._gauge("distbench_written_timestamp_seconds", "When this file was written.", time.time())
        yield self._gauge("distbench_lost_rows", "Rows that limits lost, over all cases.", totals.lost_rows)
        if totals.max_recv:
            text = "Most rows that a rank received, over cases."
            yield self._gauge("distbench_max_recv_rows", text, max(totals.max_recv))
        if totals.limit_rows:
            text = "Rows that a limit keeps, over cases with one."
            rows = {"min": min(totals.limit_rows), "max": max(totals.limit_rows)}
            yield self._by("statistic", "distbench_limit_rows", text, rows)
        yield from self._rates()
        yield self._stages()

    def _rates(self) -> Iterator[Metric]:
        totals = self._totals
        ended = _seconds(max(totals.ended, default=""))
        if ended is not None:
            yield self._gauge("distbench_ended_timestamp_seconds", "When the last case ended.", ended)
        planned = totals.cases + totals.missing
        if planned:
            share = totals.as_expected / planned
            yield self._gauge("distbench_as_expected_ratio", "Share of cases as expected.", share)
        if totals.cases:
            busy = sum(totals.wall_s)
            text = "Seconds that all cases took on rank 0, without start-up."
            yield self._gauge("distbench_busy_seconds", text, busy)
            if busy:
                text = "Cases a second, without start-up."
                yield self._gauge("distbench_cases_per_second", text, totals.cases / busy)

    def _stages(self) -> Metric:
        text = "Over cases: the slowest rank's median time of a stage. A harness figure where emulated."
        family = self._family("distbench_stage_seconds", text, "arm", "stage", "samples", "statistic")
        for (arm, stage, samples), values in self._totals.medians_us.items():
            for statistic, value in zip(_STATISTICS, quantiles_of(values), strict=True):
                family.add_metric((*self._whose, arm, stage, samples, statistic), value / 1e6)
        return family

    def _family(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        """A metric without a value; its first labels keep the series of two files apart."""
        return GaugeMetricFamily(name, text, labels=("suite", "case", *labels))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = self._family(name, text)
        family.add_metric(self._whose, value)
        return family

    def _by(self, label: str, name: str, text: str, counts: Mapping[str, int]) -> Metric:
        family = self._family(name, text, label)
        for value, count in counts.items():
            family.add_metric((*self._whose, value), count)
        return family


def _named(counts: Mapping[Verdict, int]) -> dict[str, int]:
    return {verdict.value: counts.get(verdict, 0) for verdict in Verdict}


def _seconds(ended: str) -> float | None:
    """Seconds since the epoch of a report's `ended`; None for an invalid time."""
    try:
        return datetime.strptime(ended, ENDED).replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None
