"""A Prometheus text file, such as node_exporter's textfile collector reads.

Labels take values from lists that the code fixes (verdicts, arms, stages), so the number of series is bounded whatever
a suite holds; no case and no host is a label.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import BinaryIO, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distbench import __version__
from distbench.errors import Verdict
from distbench.export.totals import Totals, quantiles_of
from distbench.limits import Proof
from distbench.report.results import Results

_STATISTICS = ("median", "p99", "max")


def write(results: Results, file: BinaryIO) -> None:
    """Write gauges, all of them of the results as they stand."""
    registry = CollectorRegistry()
    registry.register(_Collector(Totals(results)))
    file.write(generate_latest(registry))


class _Collector(Collector):
    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        totals = self._totals
        info = GaugeMetricFamily("distbench_info", "Always 1.", labels=("version", "emulated"))
        info.add_metric((__version__, "true" if totals.stand_ins else "false"), 1)
        yield info
        yield _by_verdict("distbench_cases", "Cases by verdict.", totals.verdicts)
        yield _by_verdict("distbench_cases_unexpected", "Cases not as expected, by verdict.", totals.unexpected)
        yield _by_proof(totals.limits)
        yield gauge("distbench_cases_missing", "Cases that have no result.", totals.missing)
        yield gauge("distbench_exit_code", "The exit code of all results together.", totals.exit_code)
        yield gauge("distbench_written_timestamp_seconds", "When this file was written.", time.time())
        planned = totals.cases + totals.missing
        if planned:
            yield gauge("distbench_as_expected_ratio", "Share of cases as expected.", totals.as_expected / planned)
        if totals.cases:
            busy = sum(totals.wall_s)
            yield gauge("distbench_busy_seconds", "Seconds that all cases took on rank 0, without start-up.", busy)
            if busy:
                yield gauge("distbench_cases_per_second", "Cases a second, without start-up.", totals.cases / busy)
        yield self._stages()

    def _stages(self) -> Metric:
        text = "Over cases: the slowest rank's median time of a stage. A harness figure where emulated."
        family = GaugeMetricFamily("distbench_stage_seconds", text, labels=("arm", "stage", "statistic"))
        for (arm, stage), values in self._totals.medians_us.items():
            for statistic, value in zip(_STATISTICS, quantiles_of(values), strict=True):
                family.add_metric((arm, stage, statistic), value / 1e6)
        return family


def _by_proof(counts: Mapping[str, int]) -> Metric:
    text = "Cases by what their limit is safe for: any routing of their token counts, their batch only, or nothing."
    family = GaugeMetricFamily("distbench_cases_by_limit", text, labels=("proof",))
    for proof in get_args(Proof):
        family.add_metric((proof,), counts.get(proof, 0))
    return family


def gauge(name: str, text: str, value: float) -> Metric:
    """Return a metric with one value and no label."""
    return GaugeMetricFamily(name, text, value=value)


def _by_verdict(name: str, text: str, counts: dict[Verdict, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=("verdict",))
    for verdict in Verdict:
        family.add_metric((verdict.value,), counts.get(verdict, 0))
    return family
