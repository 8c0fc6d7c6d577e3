"""A Prometheus text file; no node is a label, so the number of series does not depend on the cluster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distbench.tools.cluster.plan import STEPS
from distbench.tools.cluster.validation import Validation

_RESULTS = ("pass", "fail")


def write(validation: Validation, file: BinaryIO) -> None:
    """Write gauges of the groups' results and of the numbers of nodes named."""
    registry = CollectorRegistry()
    registry.register(_Collector(validation))
    file.write(generate_latest(registry))


class _Collector(Collector):
    def __init__(self, validation: Validation) -> None:
        self._validation = validation

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        validation = self._validation
        yield self._groups()
        yield self._gauge("distbench_cluster_nodes", "Nodes of the plan.", len(validation.nodes))
        yield self._gauge("distbench_cluster_defects", "Nodes at fault.", len(validation.defects))
        yield self._gauge("distbench_cluster_slow_nodes", "Slow nodes.", len(validation.slow))
        yield self._gauge("distbench_cluster_findings", "Findings, links included.", len(validation.findings))
        yield self._gauge("distbench_cluster_not_judged", "Kinds of slowness not judged.", len(validation.not_judged))
        yield self._gauge("distbench_cluster_exit_code", "The exit code of the plan.", validation.exit_code)
        yield self._gauge("distbench_cluster_written_timestamp_seconds", "When this file was written.", time.time())

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        """A metric with one value; node_exporter refuses files of two suites without a label that differs."""
        family = GaugeMetricFamily(name, text, labels=("suite",))
        family.add_metric((self._validation.suite,), value)
        return family

    def _groups(self) -> Metric:
        family = GaugeMetricFamily(
            "distbench_cluster_groups", "Groups of nodes by step.", labels=("suite", "step", "result")
        )
        counts = Counter((trial.step, _RESULTS[trial.failed]) for trial in self._validation.trials)
        for step in STEPS:
            for result in _RESULTS:
                family.add_metric((self._validation.suite, step, result), counts[step, result])
        return family
