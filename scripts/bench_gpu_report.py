"""Measurements of bench_gpu.py as lines and as checks against bounds."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from distbench.experts.selection.releases import padded_rows

CAPACITY = 32768
GRAPH_BOUND, EAGER_BOUND, PEAK_SHARE, PEER_BOUND, CUT_BOUND = 1.35, 1.5, 0.6, 2.0, 1.05
WEIGHT_BOUND_ROWS, PEAK_ROWS = (64, 128, 256), (4096, 8192)
PEERS = ("grouped_mm", "grouped_mm told")


class Check(NamedTuple):
    """A measured value and its bound: `most`, or else `least`."""

    text: str
    value: float
    bound: float
    most: bool = True

    @property
    def passed(self) -> bool:
        """Whether the value is within the bound."""
        return self.value <= self.bound if self.most else self.value >= self.bound

    def __str__(self) -> str:
        """One line of the result."""
        side = "at most" if self.most else "at least"
        return f"{self.text}: {self.value:.3f}, {side} {self.bound:g}: {'ok' if self.passed else 'MISSED'}"


class Row(NamedTuple):
    """Measurements at a number of live rows: samples in microseconds by name, and both limits."""

    rows: int
    routes: int
    experts: int
    kernel: str
    weights_us: float
    product_us: float
    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median of the samples of `name`, microseconds."""
        return statistics.median(self.samples[name])


def print_rows(exact: list[Row], cuts: list[Row]) -> None:
    """Print the medians: by live rows, of the peers, and of cut and padded buffers."""
    print(" rows  routes  experts  graph us  eager us  weights us  product us  kernel")
    for row in exact:
        times = f"{row.median('graph'):8.1f}  {row.median('eager'):8.1f}"
        limits = f"{row.weights_us:10.0f}  {row.product_us:10.0f}"
        print(f"{row.rows:>5}  {row.routes:>6}  {row.experts:>7}  {times}  {limits}  {row.kernel}")
    for row in (one for one in exact if len(one.samples) > len(("graph", "eager"))):
        peers = ", ".join(f"{name} {row.median(name):.0f} us" for name in row.samples if name.startswith("grouped_mm"))
        print(f"{row.rows:>5} rows: {peers}")
    print(f" live  graph us: exact  bucket  padded to {CAPACITY}   eager us: exact  bucket  padded")
    for row in cuts:
        graph, eager = (
            "  ".join(f"{row.median(f'{name} {how}'):8.1f}" for name in ("exact", "bucket", "padded"))
            for how in ("graph", "eager")
        )
        print(f"{row.rows:>5}  {graph}   {eager}")


def checks_of(exact: list[Row], cuts: list[Row], *, peak: bool) -> list[Check]:
    """Checks of the measurements against their bounds; `peak` adds the fraction of the bf16 matrix peak."""
    checks = []
    for row in exact:
        name = f"{row.rows} rows"
        if row.rows in WEIGHT_BOUND_ROWS:
            checks += [
                Check(f"{name}, graph / reading the weights", row.median("graph") / row.weights_us, GRAPH_BOUND),
                Check(f"{name}, eager / reading the weights", row.median("eager") / row.weights_us, EAGER_BOUND),
            ]
        if peak and row.rows in PEAK_ROWS:
            share = row.product_us / row.median("graph")
            checks.append(Check(f"{name}, share of the bf16 matrix peak", share, PEAK_SHARE, most=False))
        for peer in (
            one.removesuffix(" graph") for one in row.samples if one.startswith("grouped_mm") and "graph" in one
        ):
            least = PEER_BOUND if row.rows >= min(PEAK_ROWS) and peer == "grouped_mm" else 1.0
            for how in ("graph", "eager"):
                gain = row.median(f"{peer} {how}") / row.median(how)
                checks.append(Check(f"{name}, {peer} / ours, {how}", gain, least, most=False))
    for row in cuts:
        ratio = row.median("bucket graph") / row.median("exact graph")
        checks.append(Check(f"{row.rows} live rows, cut to {padded_rows(row.rows)} / exact", ratio, CUT_BOUND))
    return checks
