"""Cost of the Triton experts on this GPU, compared with its limits and with torch's grouped matrix product.

One rank's part of DeepSeek-V3's layer (32 of 256 experts, top-8, uniform routing; a received row has at least one local
expert, 1.5 on average) with gaussian values. Limits: the weights of the experts that are hit, read once at the measured
bandwidth of a copy (bytes read and written), and the operations of the real routes at the measured rate of a large
matrix product. Every row count is checked once against the oracle, and what the last timed replay left against an
untimed call. Times are medians, of eager calls after a hundred that are not timed; `--json` keeps all samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_gpu_peer import GroupedPeer
from bench_gpu_report import CAPACITY, Row, checks_of, print_rows
from torch import Tensor

from distbench.experts.selection.releases import padded_rows
from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import LayerShape
from distbench.experts.triton.table import shipped_selector
from distbench.tools.tune.trial import GRAPH_CALLS, capture, graph_us, make_layer, run, time_us
from distbench.workload.batch import TokenBatch

EXACT_ROWS = tuple(1 << power for power in range(16))
CUT_ROWS = (48, 100, 200, 400, 800, 1500, 3000, 6000)
REPLAYS = 21
# The first eager calls of a process take 1.7 times as long as later ones: Python has to warm up.
WARM_CALLS = 100
COPIED_BYTES = 4 << 30
PRODUCT = 8192
PEER_ERROR = 1e-2


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
    print_rows(exact, cuts)
    checks = checks_of(exact, cuts, peak=options.dispatch_dtype == "bf16")
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
    """Bytes read and written per second by a copy from device to device."""
    source = torch.randint(0, 1 << 60, (COPIED_BYTES // 8,), device="cuda")
    target = torch.empty_like(source)
    micros = [time_us(partial(target.copy_, source)) for _ in range(REPLAYS)]
    return 2e6 * COPIED_BYTES / statistics.median(micros)


def measure_product() -> float:
    """Operations per second of a bf16 matrix product of random values."""
    left, right = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    micros = graph_us(partial(torch.mm, left, right), replays=REPLAYS)
    return 2e6 * PRODUCT**3 / statistics.median(micros)


class Bench:
    """The layer, and the experts that are measured."""

    def __init__(self, quant: str, bandwidth: float, rate: float) -> None:
        """`bandwidth` in bytes per second, `rate` in operations per second."""
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
            torch.cuda.empty_cache()
            needed, free = peer.device_bytes(), torch.cuda.mem_get_info()[0]
            if needed > free:
                print(f"{rows} rows: {peer.name} NOT MEASURED, it takes about {needed} bytes and {free} are free")
                continue
            _close(peer(), expected)
            samples[f"{peer.name} graph"] = graph_us(peer, replays=REPLAYS)
            samples[f"{peer.name} eager"] = _eager_us(peer)
        return self._row(rows, samples)

    def cut(self, rows: int) -> Row:
        """Measure `rows` live rows in buffers of `rows` rows, of their bucket, and of the capacity, in turn."""
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
        """Replay a graph of each batch in turn; check that the last replay has the bits of an eager call."""
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
        samples = _eager_us(call)
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


def _eager_us(call: Callable[[], object]) -> list[float]:
    for _ in range(WARM_CALLS):
        call()
    return [time_us(call) for _ in range(REPLAYS)]


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


def _progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
