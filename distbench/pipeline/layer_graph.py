"""The whole layer of an arm in one CUDA graph, replayed with other tokens, routings, live rows and idle ranks.

Dispatch, cut, experts and combine are captured together, so nothing in them may read from the device. A replay is a
collective: all ranks make the same ones in the same order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.case.stages import Arm, Stage
from distbench.distributed.session import Session
from distbench.distributed.waits import waiting
from distbench.experts.base import Cut
from distbench.pipeline.graphs import Captured, capture, warm_up
from distbench.pipeline.layer import run_layer
from distbench.pipeline.observer import Observer
from distbench.pipeline.parts import Parts
from distbench.pipeline.replays import compared
from distbench.verify.records import ORACLE, Divergence, LayerGraph, Replay
from distbench.verify.row_compare import integer_view
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import recv_counts

_FRESH_TOKENS = 1 << 27
_ROUNDS = 2
_TIMED = 20
_NO_EXPERT = -1


class _Scene(NamedTuple):
    """One replay: its name, and this rank's tokens."""

    name: str
    batch: TokenBatch


def prove_layer(parts: Parts, cuts: Mapping[Arm, Cut]) -> None:
    """Capture a layer with each cut, and discard the graph. Collective.

    Raises:
        Unsupported: it cannot be captured, on this rank.
    """
    for cut in cuts.values():
        _captured(_layer(parts, parts.batch, cut))


def replay_layers(session: Session, parts: Parts, arms: Mapping[Arm, Cut], observer: Observer) -> list[LayerGraph]:
    """Capture the layer of each arm, replay it, and record wrong tokens. Collective."""
    return [_of_arm(session, parts, arm, cut, observer) for arm, cut in arms.items()]


def _of_arm(session: Session, parts: Parts, arm: str, cut: Cut, observer: Observer) -> LayerGraph:
    session.heartbeat.arm = arm
    held = _copied(parts.batch)
    layer = _layer(parts, held, cut)
    graph = _captured(layer)
    kept = observer.kernels[arm]["rows"]
    replays: list[Replay] = []
    skipped = 0
    for scene in _scenes(session.rank, parts):
        session.heartbeat.mark(Stage.TIMING)
        sent = recv_counts(scene.batch.ids, parts.workload.experts_per_rank, parts.workload.group.ep_size)
        if int(session.everyones(sent.cpu()).sum(0).max()) > kept:
            skipped += 1
            continue
        _fill(held, scene.batch)
        graph.graph.replay()
        tokens = graph.output.clone()
        expected = parts.workload.expected(scene.batch)
        against = "the eager layer" if expected is None else ORACLE
        found = compared(tokens, layer() if expected is None else expected, observer.replay_tolerance(arm))
        if found.wrong and not any(one.wrong for one in replays):
            observer.take_divergence(_divergence(session.rank, arm, scene.name, against, found.wrong))
        replays.append(found)
    _fill(held, parts.batch)
    host_us, device_us = _times(session, graph)
    session.heartbeat.arm = ""
    return LayerGraph(arm=arm, replays=replays, skipped=skipped, host_us=host_us, device_us=device_us)


def _divergence(rank: int, arm: str, name: str, against: str, tokens: int) -> Divergence:
    field = f"tokens of a replay of the layer's graph ({name})"
    return Divergence(stage=Stage.COMBINE, arm=arm, rank=rank, field=field, against=against, rows=tokens)


def _layer(parts: Parts, batch: TokenBatch, cut: Cut) -> partial[Tensor]:
    return partial(run_layer, batch, parts.weights, parts.transport, parts.experts, cut, None, _ignore)


def _captured(layer: partial[Tensor]) -> Captured:
    warm_up(layer)
    return capture(layer, "the layer")


def _scenes(rank: int, parts: Parts) -> Iterator[_Scene]:
    """The case's own tokens; then, in turn, others with another routing, fewer of them, and ranks without any."""
    own, ranks = parts.batch, parts.workload.group.ep_size
    count = own.ids.shape[0]
    yield _Scene("the same tokens", own)
    for number in range(_ROUNDS):
        index = torch.arange(count, device=own.ids.device) + _FRESH_TOKENS + number * count
        fresh = parts.workload.tokens(rank, index)
        idle = number % ranks
        yield _Scene("other tokens", fresh)
        yield _Scene("half of other tokens", _without(fresh, slice(1, None, 2)))
        yield _Scene(f"rank {idle} idle", _without(fresh, slice(None)) if rank == idle else fresh)
        yield _Scene("all ranks idle", _without(fresh, slice(None)))
    yield _Scene("the same tokens again", own)


def _without(batch: TokenBatch, tokens: slice) -> TokenBatch:
    """The batch with some tokens that go to no expert, as production pads a captured batch."""
    ids = batch.ids.clone()
    ids[tokens] = _NO_EXPERT
    return batch._replace(ids=ids)


def _copied(batch: TokenBatch) -> TokenBatch:
    scales = None if batch.scales is None else batch.scales.clone()
    return TokenBatch(batch.hidden.clone(), scales, batch.weights.clone(), batch.ids.clone())


def _fill(held: TokenBatch, batch: TokenBatch) -> None:
    for kept, part in zip(held, batch, strict=True):
        if kept is not None and part is not None:
            integer_view(kept).copy_(integer_view(part))


def _times(session: Session, graph: Captured) -> tuple[float, float]:
    """Median microseconds of a replay: of the host, and of the device, ranks starting together."""
    host, events = [], []
    for _ in range(_TIMED):
        session.on_any_rank(value=False)  # a barrier
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        began = time.perf_counter_ns()
        graph.graph.replay()
        host.append((time.perf_counter_ns() - began) / 1000)
        end.record()
        events.append((begin, end))
    with waiting("this rank's device"):
        torch.cuda.synchronize()
    device = [begin.elapsed_time(end) * 1000 for begin, end in events]
    return round(statistics.median(host), 1), round(statistics.median(device), 1)


def _ignore(_: Stage) -> None:
    """Mark nothing."""
