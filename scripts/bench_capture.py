#!/usr/bin/env python3
"""The cost of a capture: processor time of the step's thread and of the writer, over SGLang's lifted dispatcher.

    pip download --no-deps sglang==0.5.23
    scripts/bench_capture.py sglang-0.5.23-*.whl

A step is a dispatch by SGLang's own `MoriEPDispatcher` in each of 58 layers, of 128 tokens with 8 experts each, over an
operator that returns buffers as they are; a step begins every 20 ms. The time that capture adds is the difference
between steps with and without it, in blocks that take turns. All are processor times.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import msgspec
import torch

from distbench.callers.packages import package_text
from distbench.callers.setting import Setting
from distbench.callers.sglang.lifted import Package, kernel_type, load
from distbench.capture import sglang
from distbench.capture.settings import Settings
from distbench.case.resolve import Layer, resolve_case

LAYERS, TOKENS, RANKS, STEP_MS = 58, 128, 16, 20.0
BLOCKS, STEPS = 6, 48


class Operator:
    """MoRI's operator without ranks: the buffers of a receive, as they are."""

    def __init__(self, topk: int, rows: int) -> None:
        ids, weights = torch.zeros(rows, topk, dtype=torch.int32), torch.zeros(rows, topk)
        self.config = SimpleNamespace(kernel_type=kernel_type("IntraNode"))
        self._buffers = torch.zeros(rows, 64), weights, None, ids, torch.tensor([rows // 2], dtype=torch.int32)
        self._rows = rows

    def dispatch(self, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Return the buffers."""
        return self._buffers

    def max_num_tokens_to_recv(self) -> int:
        """Rows of the receive buffer."""
        return self._rows


def _unused(*_: Any) -> None:
    """Experts and quantisers, which no step calls."""


def dispatchers(wheel: str) -> tuple[type, list[Any]]:
    """SGLang's class, and a dispatcher of each layer on rank 0 of 16."""
    values = {"model": "deepseek-v3", "caller": "sglang", "caller_wheel": wheel, "experts": "aiter", "emulate": True}
    case = msgspec.structs.replace(resolve_case([Layer("flag", values)], RANKS).case, caller_wheel=wheel)
    stand_in = importlib.import_module("distbench.experts.aiter.emulated")
    package = Package(stand_in, "gfx942", _unused, lambda _: _unused)
    names = load(package_text(case), Setting(case, 0, torch.device("cpu"), None, "IntraNode", ()), package).dispatcher
    kind, op, made = names["MoriEPDispatcher"], Operator(case.topk, RANKS * TOKENS), []
    for _ in range(LAYERS):
        one = kind(
            group=None,
            router_topk=case.topk,
            num_experts=case.num_experts,
            num_local_experts=case.experts_per_rank,
            hidden_size=64,
            params_dtype=torch.bfloat16,
            deepep_mode=names["DeepEPMode"].NORMAL,
        )
        one._normal_dispatcher._mori_op = op  # noqa: SLF001 - SGLang builds it lazily, over a group of its own
        made.append(one)
    return kind, made


def steps(layers: list[Any], rows: torch.Tensor, topk: Any) -> float:
    """Processor time of the thread for a step, in microseconds, without combine."""
    stage = layers[0]._stage  # noqa: SLF001 - combine would put it back
    busy = 0.0
    for _ in range(STEPS):
        start, end = time.thread_time(), time.monotonic() + STEP_MS / 1e3
        for layer in layers:
            layer.dispatch(rows, topk)
            layer._stage = stage  # noqa: SLF001
        busy += time.thread_time() - start
        time.sleep(max(end - time.monotonic(), 0))
    return busy / STEPS * 1e6


def measure(kind: type, layers: list[Any], settings: Settings) -> tuple[float, float, float, int]:
    """Microseconds a step without capture, added by it, and of the writer; dispatches left out."""
    ids = torch.stack([torch.randperm(256)[:8] for _ in range(TOKENS)]).int()
    topk = SimpleNamespace(topk_weights=torch.full(ids.shape, 0.125), topk_ids=ids)
    rows = torch.zeros(TOKENS, 64, dtype=torch.bfloat16)
    off, on, writing, left_out = [], [], [], 0
    steps(layers, rows, topk)
    for block in range(BLOCKS):
        off.append(steps(layers, rows, topk))
        with tempfile.TemporaryDirectory() as folder:
            opened = settings._replace(folder=str(Path(folder, f"capture-{block}")))
            with sglang.recording(kind, opened):
                steps(layers, rows, topk)  # the thread, its memory and the first file
                thread = next(one for one in threading.enumerate() if one.name == "distbench-capture")
                clock = time.pthread_getcpuclockid(thread.ident or 0)
                before = time.clock_gettime(clock)
                on.append(steps(layers, rows, topk))
                time.sleep(0.3)  # for what is in the queue
                writing.append((time.clock_gettime(clock) - before) / STEPS * 1e6)
            counts = json.loads(Path(opened.folder, "rank-00000.json").read_text())
            left_out += counts["behind"]
    return median(off), median(on) - median(off), median(writing), left_out


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", help="SGLang's")
    kind, layers = dispatchers(parser.parse_args().wheel)
    print(f"us a step of {LAYERS} layers; share of a step of {STEP_MS:.0f} ms")
    for every in (1, 8, 32):
        for weights, violations in ((False, False), (True, False), (False, True)):
            settings = Settings("", every=every, weights=weights, violations=violations)
            off, added, writing, left_out = measure(kind, layers, settings)
            share = (added + writing) / STEP_MS / 10
            told = f"every {every:4} weights {weights:d} violations {violations:d}: off {off:6.0f}"
            print(f"{told}, added {added:6.0f}, writer {writing:6.0f}: {share:.2f} %, {left_out} left out", flush=True)


if __name__ == "__main__":
    main()
