"""What the Triton experts cost on this GPU, beside its limits and beside torch's grouped matrix product.

One rank's part of DeepSeek-V3's layer (32 of 256 experts, top-8, uniform routing; a received row has at least one local
expert, 1.5 on average) with gaussian values. Limits: the weights of the experts that are hit, read once at the measured
bandwidth of a copy (bytes read and written), and the operations of the real routes at the measured rate of a large
matrix product. Every row count is checked once against the oracle, and what the last timed replay left against an
untimed call. Times are medians; `--json` keeps all samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bench_gpu_peer import GroupedPeer
from torch import Tensor

from distbench.experts.rules import padded_rows
from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import LayerShape
from distbench.experts.triton.table import shipped_selector
from distbench.experts.triton.trial import GRAPH_CALLS, capture, graph_us, make_layer, run, time_us
from distbench.workload.batch import TokenBatch

EXACT_ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
CUT_ROWS = (48, 100, 200, 400, 800, 1500, 3000, 6000)
CAPACITY = 32768
REPLAYS = 21
COPIED_BYTES = 4 << 30
PRODUCT = 8192
GRAPH_BOUND, EAGER_BOUND, PEAK_SHARE, PEER_BOUND, CUT_BOUND = 1.35, 1.5, 0.6, 2.0, 1.05
PEER_ERROR = 1e-2
PEERS = ("grouped_mm", "grouped_mm told")
WEIGHT_BOUND_ROWS, PEAK_ROWS = (64, 128, 256), (4096, 8192)


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
    """What was measured at a number of live rows: samples in microseconds, by name, and both limits."""

    rows: int
    routes: int
    experts: int
    kernel: str
    weights_us: float
    product_us: float
    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median of the samples of `name`."""
        return statistics.median(self.samples[name])


def main() -> int:
    """Measure, print, and return 1 if a bound is missed."""
    options = _parse()
    if not torch.cuda.is_available():
        print("bench: torch sees no GPU", file=sys.stderr)
        return 77
    bandwidth, rate = measure_copy(), measure_product()
    name = torch.cuda.get_device_name()
    print(f"{name}: copy {bandwidth / 1e12:.3f} TB/s, matrix product {rate / 1e12:.0f} TFLOP/s")
    bench = Bench(options.dispatch_dtype, bandwidth, rate)
    exact = [bench.exact(rows) for rows in EXACT_ROWS]
    cuts = [bench.cut(rows) for rows in CUT_ROWS]
    _print_rows(exact, cuts)
    checks = _checks(exact, cuts, peak=options.dispatch_dtype == "bf16")
    print("\n".join(map(str, checks)))
    if options.json:
        raw = {
            "device": name,
            "dispatch_dtype": options.dispatch_dtype,
            "copy_bytes_per_s": bandwidth,
            "product_flop_per_s": rate,
            "exact": [row._asdict() for row in exact],
            "cut": [row._asdict() for row in cuts],
        }
        options.json.write_text(json.dumps(raw, indent=1) + "\n")
    return 0 if all(check.passed for check in checks) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatch-dtype", choices=("bf16", "fp8"), default="bf16", help="rows (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the samples here")
    return parser.parse_args()


def measure_copy() -> float:
    """Return bytes read and written a second by a copy from device to device."""
    source = torch.randint(0, 1 << 60, (COPIED_BYTES // 8,), device="cuda")
    target = torch.empty_like(source)
    micros = [time_us(partial(target.copy_, source)) for _ in range(REPLAYS)]
    return 2e6 * COPIED_BYTES / statistics.median(micros)


def measure_product() -> float:
    """Return operations a second of a bf16 matrix product of random values."""
    left, right = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    micros = graph_us(partial(torch.mm, left, right), replays=REPLAYS)
    return 2e6 * PRODUCT**3 / statistics.median(micros)


class Bench:
    """The layer, and the experts that are measured."""

    def __init__(self, quant: str, bandwidth: float, rate: float) -> None:
        """`bandwidth` in bytes a second, `rate` in operations a second."""
        self._shape = LayerShape(
            num_experts=256,
            num_local_experts=32,
            hidden_size=7168,
            intermediate_size=2048,
            topk=8,
            quant="fp8" if quant == "fp8" else "bf16",
        )
        self._bandwidth, self._rate = bandwidth, rate
        selector = shipped_selector(self._shape, torch.cuda.get_device_name())
        print(f"table: {selector.table or 'none, heuristics only'}")
        self._experts, self._checked = TritonExperts(selector), TritonExperts(selector)
        self._layer, self._exact = make_layer(self._shape, "gaussian"), make_layer(self._shape, "exact")
        self._rows = self._layer.received(CAPACITY)
        told = () if quant == "fp8" else (False, True)
        self._peers = [GroupedPeer(self._layer.local, told=one) for one in told]

    def exact(self, rows: int) -> Row:
        """Measure a buffer of exactly `rows` rows, all live, and the peers on the same rows."""
        _progress(f"{rows} rows")
        self._check_oracle(rows, rows)
        batch = _first(self._rows, rows)
        samples = {
            "graph": self._graph_samples({"": batch}, rows)[""],
            "eager": self._eager_samples(batch, rows),
        }
        expected = run(self._experts, self._layer.local, batch, _number(rows))
        for peer in self._peers:
            peer.take(batch)
            _close(peer(), expected)
            samples[f"{peer.name} graph"] = graph_us(peer, replays=REPLAYS)
            samples[f"{peer.name} eager"] = [time_us(peer) for _ in range(REPLAYS)]
        return self._row(rows, samples)

    def cut(self, rows: int) -> Row:
        """Measure `rows` live rows in a buffer of just as many, of their bucket, and of the whole capacity, in turn."""
        _progress(f"{rows} rows, cut and padded")
        allocated = {"exact": rows, "bucket": padded_rows(rows), "padded": CAPACITY}
        for size in allocated.values():
            self._check_oracle(rows, size)
        batches = {name: _first(self._rows, size) for name, size in allocated.items()}
        samples = {f"{name} graph": taken for name, taken in self._graph_samples(batches, rows).items()}
        for name, batch in batches.items():
            samples[f"{name} eager"] = self._eager_samples(batch, rows)
        return self._row(rows, samples)

    def _graph_samples(self, batches: dict[str, TokenBatch], live: int) -> dict[str, list[float]]:
        """Replay a graph of each batch in turn; the bits that the last replay left are those of an eager call."""
        number = _number(live)
        kept: dict[str, Tensor] = {}

        def call(name: str) -> None:
            kept[name] = run(self._experts, self._layer.local, batches[name], number)

        expected = {}
        for name in batches:
            call(name)
            expected[name] = kept[name][:live].clone()
        replays = {name: capture(partial(call, name)) for name in batches}
        samples: dict[str, list[float]] = {name: [] for name in batches}
        for _ in range(REPLAYS):
            for name, replay in replays.items():
                samples[name].append(time_us(replay) / GRAPH_CALLS)
        for name in batches:
            _same(kept[name][:live], expected[name])
        return samples

    def _eager_samples(self, batch: TokenBatch, live: int) -> list[float]:
        number = _number(live)
        kept: list[Tensor] = []

        def call() -> None:
            kept[:] = [run(self._experts, self._layer.local, batch, number)]

        call()
        expected = kept[0][:live].clone()
        samples = [time_us(call) for _ in range(REPLAYS)]
        _same(kept[0][:live], expected)
        return samples

    def _check_oracle(self, live: int, allocated: int) -> None:
        batch = self._exact.received(live)
        padding = allocated - live
        scales = None if batch.scales is None else _padded(batch.scales, padding)
        padded = TokenBatch(
            _padded(batch.hidden, padding), scales, _padded(batch.weights, padding), _padded(batch.ids, padding)
        )
        output = run(self._checked, self._exact.local, padded, _number(live))
        expected = self._exact.workload.expected_rows(0, batch)
        if expected is None:
            sys.exit("bench: the exact workload has no oracle")
        _same(output[:live], expected)

    def _row(self, rows: int, samples: dict[str, list[float]]) -> Row:
        local = self._rows.ids[:rows]
        local = local[local < self._shape.num_local_experts]
        touched, routes = int(local.unique().numel()), local.numel()
        elements = 3 * self._shape.intermediate_size * self._shape.hidden_size
        size = 1 if self._shape.quant == "fp8" else 2
        return Row(
            rows=rows,
            routes=routes,
            experts=touched,
            kernel=self._experts.selection(rows).label,
            weights_us=1e6 * touched * elements * size / self._bandwidth,
            product_us=1e6 * 2 * routes * elements / self._rate,
            samples=samples,
        )


def _first(batch: TokenBatch, rows: int) -> TokenBatch:
    scales = None if batch.scales is None else batch.scales[:rows].clone()
    return TokenBatch(batch.hidden[:rows].clone(), scales, batch.weights[:rows].clone(), batch.ids[:rows].clone())


def _padded(part: Tensor, rows: int) -> Tensor:
    junk = torch.full((rows, part.shape[1]), float("nan") if part.is_floating_point() else 1.0, device=part.device)
    return torch.cat([part, junk.to(part.dtype)])


def _number(rows: int) -> Tensor:
    return torch.tensor([rows], dtype=torch.int32, device="cuda")


def _same(actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual.view(torch.int16), expected.view(torch.int16)):
        sys.exit("bench: a timed call gave other bits than it should")


def _close(actual: Tensor, expected: Tensor) -> None:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not error < PEER_ERROR:
        sys.exit(f"bench: the peer computes something else, by {error:.3g}")


def _print_rows(exact: list[Row], cuts: list[Row]) -> None:
    print("rows  routes  experts  graph us  eager us  weights us  product us  kernel")
    for row in exact:
        times = f"{row.median('graph'):8.1f}  {row.median('eager'):8.1f}"
        limits = f"{row.weights_us:10.0f}  {row.product_us:10.0f}"
        print(f"{row.rows:>4}  {row.routes:>6}  {row.experts:>7}  {times}  {limits}  {row.kernel}")
    for row in (one for one in exact if len(one.samples) > len(("graph", "eager"))):
        peers = ", ".join(f"{name} {row.median(name):.0f} us" for name in row.samples if name.startswith("grouped_mm"))
        print(f"{row.rows:>4} rows: {peers}")
    print(f"live  graph us: exact  bucket  padded to {CAPACITY}   eager us: exact  bucket  padded")
    for row in cuts:
        graph, eager = (
            "  ".join(f"{row.median(f'{name} {how}'):8.1f}" for name in ("exact", "bucket", "padded"))
            for how in ("graph", "eager")
        )
        print(f"{row.rows:>4}  {graph}   {eager}")


def _checks(exact: list[Row], cuts: list[Row], *, peak: bool) -> list[Check]:
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
            least = PEER_BOUND if row.rows in PEAK_ROWS and peer == "grouped_mm" else 1.0
            for how in ("graph", "eager"):
                gain = row.median(f"{peer} {how}") / row.median(how)
                checks.append(Check(f"{name}, {peer} / ours, {how}", gain, least, most=False))
    for row in cuts:
        ratio = row.median("bucket graph") / row.median("exact graph")
        checks.append(Check(f"{row.rows} live rows, cut to {padded_rows(row.rows)} / exact", ratio, CUT_BOUND))
    return checks


def _progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
