"""Replays of the last arm's graph with other tokens, which show what the capture has frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.case.stages import Stage
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.pipeline.graphs import GraphedExperts
from distbench.pipeline.observer import Observer
from distbench.pipeline.parts import Parts
from distbench.verify.records import Divergence, Replay
from distbench.verify.row_compare import differing, integer_view, row_errors
from distbench.workload.inputs import Workload

_FRESH_TOKENS = 1 << 26
_MOST_FRESH = 4096


def replay_graph(parts: Parts, rank: int, observer: Observer) -> list[Replay]:
    """Replay the graph of the arm that ran last, and record wrong rows; nothing where experts run without graphs."""
    graphed, given = parts.graphed, observer.given
    if graphed is None or given is None:
        return []
    arm = list(observer.outputs)[-1]
    allowed = observer.replay_tolerance(arm)
    replays = replay_others(graphed, given, parts.weights, parts.workload, rank, allowed)
    wrong = next((replay for replay in replays if replay.wrong), None)
    if wrong is not None:
        field = f"rows of a graph replay with {wrong.live} other live rows"
        place = Divergence(
            stage=Stage.EXPERTS, arm=arm, rank=rank, field=field, against=observer.replayed_against, rows=wrong.wrong
        )
        observer.take_divergence(place)
    return replays


def replay_others(  # noqa: PLR0913 - the experts, their arguments, and the rules of judgement
    experts: GraphedExperts,
    given: ExpertInput,
    weights: ExpertWeights,
    workload: Workload,
    rank: int,
    allowed: float = 0.0,
) -> list[Replay]:
    """Replay the graph of `given` with other tokens and live-row counts.

    The buffers behind `given` are overwritten; `num_local_tokens` is restored. A replay is wrong if it differs from the
    oracle by a bit. Where the inputs have no oracle, the same experts without a graph are the reference: by a bit, or,
    where `allowed` is above 0, by more than that share of a row's largest magnitude.
    """
    live = given.num_local_tokens.clone()
    found = []
    most = min(given.rows, _MOST_FRESH)
    for count in sorted({1, most - most // 2, max(most - 1, 1), most}):
        index = torch.arange(count, device=given.hidden.device) + _FRESH_TOKENS
        fresh = workload.token_rows(torch.full_like(index, rank), index)
        for buffer, part in zip((given.hidden, given.scales, given.weights, given.ids), fresh, strict=True):
            if buffer is not None and part is not None:
                integer_view(buffer)[:count] = integer_view(part)
        given.num_local_tokens.fill_(count)
        rows = experts(given, weights)[:count].clone()
        expected = workload.expected_rows(rank, fresh)
        if expected is None:
            expected = experts.inner(given, weights)[:count]
        found.append(compared(rows, expected, allowed))
    given.num_local_tokens.copy_(live)
    return found


def compared(rows: Tensor, expected: Tensor, allowed: float) -> Replay:
    """Wrong rows [n, H] of a replay, and those within the share `allowed` of a row's largest magnitude."""
    other = differing(rows, expected).any(1)
    near = row_errors(rows, expected) <= allowed if allowed else torch.zeros_like(other)
    return Replay(live=len(rows), wrong=int((other & ~near).sum()), near=int((other & near).sum()))
