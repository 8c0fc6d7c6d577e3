"""Random draws for the experts of an exact layer: places of entries and random words, drawn in one call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.bits import words_of_streams
from distbench.workload.chunking import rows_at_a_time
from distbench.workload.exact_plan import KEPT_BYTES, ExactPlan
from distbench.workload.spread import Grid, spread


class Drawn(NamedTuple):
    """Draws of e experts: places int32 [e, entries, rows] by grid, words int32 [e, at least columns] by stream."""

    places: Mapping[str, Tensor]
    words: Mapping[str, Tensor]


def are_kept(plan: ExactPlan, device: torch.device) -> bool:
    """Whether the entries of all experts are made once for a seed and kept on `device`."""
    return rows_at_a_time(KEPT_BYTES, plan.entry_bytes, device) >= plan.num_experts


def sum_draws(plan: ExactPlan, seed: int, experts: Tensor) -> Drawn:
    """Draw the grids `up` and `down` and the words `minus`; a small layer's experts are drawn all at once."""
    if are_kept(plan, experts.device) and experts.numel() == plan.num_experts:
        return _all_draws(plan, seed, experts.device)
    return _draw(seed, experts, _sum_grids(plan), _sum_words(plan))


def probe_draws(plan: ExactPlan, seed: int, experts: Tensor) -> Drawn:
    """Draw the grids `read`, `gate` and `payload`, where such rows exist, and the words `signs` and `weights`."""
    if are_kept(plan, experts.device) and experts.numel() == plan.num_experts:
        return _all_draws(plan, seed, experts.device)
    return _draw(seed, experts, _probe_grids(plan), _probe_words(plan))


@lru_cache(maxsize=1)
def _all_draws(plan: ExactPlan, seed: int, device: torch.device) -> Drawn:
    grids, columns = _sum_grids(plan) | _probe_grids(plan), _sum_words(plan) | _probe_words(plan)
    return _draw(seed, torch.arange(plan.num_experts, device=device), grids, columns)


def _sum_grids(plan: ExactPlan) -> dict[str, Grid]:
    return {
        "up": Grid(plan.sum_rows, plan.up_entries, plan.payload_columns),
        "down": Grid(plan.sum_columns, plan.down_entries, plan.sum_rows),
    }


def _sum_words(plan: ExactPlan) -> dict[str, int]:
    return {"minus": -(-(plan.sum_rows + plan.sum_columns) // 4)}


def _probe_grids(plan: ExactPlan) -> dict[str, Grid]:
    probes = plan.probes
    if probes is None:
        return {}
    grids = {
        "read": Grid(probes.column_slots, 1, probes.column_slots),
        "gate": Grid(probes.gate_rows, sum(plan.gate_entries), plan.payload_columns),
        "payload": Grid(probes.up_rows, plan.up_payload, plan.payload_columns),
    }
    return {name: grid for name, grid in grids.items() if grid.rows}


def _probe_words(plan: ExactPlan) -> dict[str, int]:
    return {"signs": plan.probes.rows, "weights": -(-plan.probes.columns // 4)} if plan.probes else {}


def _draw(seed: int, experts: Tensor, grids: Mapping[str, Grid], columns: Mapping[str, int]) -> Drawn:
    places = dict(zip(grids, spread(seed, experts, grids), strict=True))
    rows = experts.expand(len(columns), -1)
    words = words_of_streams(seed, [f"expert/{name}" for name in columns], rows, max(columns.values()))
    return Drawn(places, dict(zip(columns, words.unbind(0), strict=True)))


def bytes_of(words: Tensor, count: int) -> Tensor:
    """Return the first `count` bytes of each row of words int32 [e, columns]: int32 [e, count]."""
    return words.view(torch.uint8)[:, :count].to(torch.int32)
