"""The Triton experts beside those of vLLM, SGLang and DeepGEMM, as far as they are installed, on one GPU.

One rank's part of a layer with gaussian values and uniform routing. Every implementation is first held against a
float32 reference; then each peer is measured in turn with ours, so that a ratio is of one time and one temperature:
CUDA graphs of one call with the L2 cache flushed before, between events, medians. Peers named with * are told each
expert's number of routes beforehand, which no call of fused_moe is; of DeepGEMM itself two products are timed alone.
`--bound 0.95` makes the exit code 1 where ours takes more than that share of vLLM's DeepGEMM experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from bench_peers_found import PEERS, Absent, Call, DeepGemmProducts, Problem, reference
from torch import Tensor

from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import LayerShape
from distbench.experts.triton.table import shipped_selector
from distbench.tools.tune.trial import TunedLayer, capture, make_layer, run, time_us
from distbench.workload.batch import TokenBatch

LAYERS = {
    "deepseek-v3": (256, 32, 7168, 2048, 8),
    "qwen3-30b-a3b": (128, 16, 2048, 768, 8),
}
PACKAGES = ("torch", "triton", "vllm", "sglang", "deep_gemm")
TOLD = ("vllm-deep-gemm", "deep-gemm")
ERRORS = {"bf16": 1e-2, "fp8": 6e-2}
WARM_UP = 3
FLUSHED_BYTES = 256 << 20


class Measured(NamedTuple):
    """Microseconds of ours and of a peer, in turn."""

    layer: str
    rows: int
    peer: str
    ours: list[float]
    theirs: list[float]
    kernel: str

    @property
    def ratio(self) -> float:
        """Ours over the peer's."""
        return statistics.median(self.ours) / statistics.median(self.theirs)

    def __str__(self) -> str:
        """One line of the result."""
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        name = self.peer + "*" * (self.peer in TOLD)
        times = f"ours {ours:.0f} us, {name} {theirs:.0f} us, {self.ratio:.3f}"
        return f"{self.layer} {self.rows:>5} rows: {times}  {self.kernel}"


def main() -> int:
    """Measure, print, and return 1 if a peer is wrong or a bound is missed."""
    options = _parse()
    if not torch.cuda.is_available():
        print("bench: torch sees no GPU", file=sys.stderr)
        return 77
    print(f"{torch.cuda.get_device_name()}, {', '.join(map(_version, PACKAGES))}")
    measured: list[Measured] = []
    wrong: list[str] = []
    with torch.inference_mode():
        for name in options.layers:
            measured += _layer(name, options, wrong)
    if options.json:
        options.json.write_text(json.dumps([one._asdict() for one in measured], indent=1) + "\n")
    missed = [one for one in measured if one.peer == "vllm-deep-gemm" and options.bound and one.ratio > options.bound]
    for one in missed:
        print(f"{one.layer} {one.rows} rows: {one.ratio:.3f} of {one.peer}, at most {options.bound:g}: MISSED")
    print("\n".join(wrong))
    return 1 if missed or wrong else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=sorted(LAYERS), default=["deepseek-v3"], help="one rank of each")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"], help="of the rows")
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 1024, 4096, 8192], help="(default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=list(PEERS), help="(default: all)")
    parser.add_argument("--samples", type=int, default=21, help="timed replays (default: %(default)s)")
    parser.add_argument("--bound", type=float, default=0.0, help="largest share of vLLM's DeepGEMM experts")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the samples here")
    return parser.parse_args()


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} not installed"


def _layer(name: str, options: argparse.Namespace, wrong: list[str]) -> list[Measured]:
    measured = []
    for quant in options.dtypes:
        experts, local, hidden, inter, topk = LAYERS[name]
        shape = LayerShape(
            num_experts=experts,
            num_local_experts=local,
            hidden_size=hidden,
            intermediate_size=inter,
            topk=topk,
            quant=quant,
        )
        triton = TritonExperts(shipped_selector(shape, torch.cuda.get_device_name()))
        layer = make_layer(shape, "gaussian")
        received = layer.received(max(options.rows))
        for rows in options.rows:
            problem = _problem(shape, triton, layer, received, rows)
            measured += Bench(f"{name} {quant}", triton, problem, options.samples, wrong).measure(options.peers)
            torch.cuda.empty_cache()
    return measured


def _problem(shape: LayerShape, triton: TritonExperts, layer: TunedLayer, received: TokenBatch, rows: int) -> Problem:
    scales = None if received.scales is None else received.scales[:rows].clone()
    batch = TokenBatch(
        received.hidden[:rows].clone(), scales, received.weights[:rows].clone(), received.ids[:rows].clone()
    )
    quantized = triton.quantized(layer.local.w1, layer.local.w2) if shape.quant == "fp8" else None
    return Problem(shape, batch, layer.local, quantized)


class Bench:
    """Ours and the peers on one problem; `wrong` collects what computes something else."""

    def __init__(self, name: str, triton: TritonExperts, problem: Problem, samples: int, wrong: list[str]) -> None:
        self._name, self._triton, self._problem, self._samples = name, triton, problem, samples
        self._wrong, self._expected = wrong, reference(problem)
        live = torch.tensor([problem.rows], dtype=torch.int32, device="cuda")
        self._ours = partial(run, triton, problem.local, problem.batch, live)

    def measure(self, peers: list[str]) -> list[Measured]:
        """Measure the peers that are here, if ours is right; print each."""
        if not self._right("ours", self._ours()):
            return []
        calls = {peer: self._made(peer) for peer in peers}
        return [self._measured(peer, call) for peer, call in calls.items() if call is not None]

    def _made(self, peer: str) -> Call | None:
        """Return a peer's call that computes the right thing, or print why there is none."""
        what = f"{self._name} {self._problem.rows:>5} rows: {peer}"
        print(f"bench: {what}", file=sys.stderr, flush=True)
        try:
            call = PEERS[peer](self._problem)
            actual = call()
        except Absent as error:
            print(f"{what} NOT MEASURED: {error}")
            return None
        except Exception as error:  # noqa: BLE001 - the peer's own, of any kind
            print(f"{what} FAILED: {type(error).__name__}: {error}")
            return None
        return call if self._right(peer, actual) else None

    def _measured(self, peer: str, call: Call) -> Measured:
        timed: Callable[[], object] = call.work if isinstance(call, DeepGemmProducts) else call
        kernel = str(self._triton.selection(self._problem.rows).label)
        samples = in_turn(self._ours, timed, self._samples)
        found = Measured(self._name, self._problem.rows, peer, *samples, kernel)
        print(found, flush=True)
        return found

    def _right(self, name: str, actual: Tensor) -> bool:
        expected = self._expected.double()
        error = float((actual.double() - expected).norm() / expected.norm())
        bound = ERRORS[self._problem.shape.quant]
        if not error < bound:
            self._wrong.append(
                f"{self._name} {self._problem.rows} rows: {name} is off by {error:.3g}, at most {bound:g}"
            )
        return error < bound


def in_turn(ours: Call, theirs: Callable[[], object], samples: int) -> tuple[list[float], list[float]]:
    """Return microseconds of a replay of each, in turn, with the order reversed each time and a cold L2 cache."""
    replays = [capture(call, calls=1) for call in (ours, theirs)]
    flush = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(samples + WARM_UP):
        for which in (0, 1) if number % 2 else (1, 0):
            flush.zero_()
            micros = time_us(replays[which])
            if number >= WARM_UP:
                found[which].append(micros)
    return found


if __name__ == "__main__":
    sys.exit(main())
