"""Where the bits of two outputs differ, counted by cells of tokens and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distbench.verify.records import CellGrid, DifferingCells, RowComparison, cell_grid
from distbench.verify.row_compare import differing


def differing_cells(
    outputs: Mapping[str, Tensor], found: Mapping[str, RowComparison], tokens: Sequence[int], rank: int
) -> dict[str, DifferingCells]:
    """Cells of each pair of `found` that is not equal; `outputs` are a rank's [n, H], `tokens` those of all ranks."""
    start = sum(tokens[:rank])
    cells = {}
    for name in (name for name, comparison in found.items() if not comparison.equal):
        first, second = name.split("/")
        wrong = differing(outputs[second], outputs[first])
        cells[name] = count_cells(wrong, start, cell_grid(sum(tokens), wrong.shape[1]))
    return cells


def count_cells(wrong: Tensor, start: int, grid: CellGrid) -> DifferingCells:
    """Count the elements of a mask, bool [n, H], whose first token is the `start`-th of all ranks."""
    by_columns = torch.stack([part.sum(1) for part in wrong.split(grid.columns, 1)], 1)
    rows = torch.arange(start, start + len(wrong), device=wrong.device) // grid.tokens
    first = start // grid.tokens
    counts = by_columns.new_zeros((start + len(wrong) - 1) // grid.tokens - first + 1, by_columns.shape[1])
    return DifferingCells(first, counts.index_add(0, rows - first, by_columns).tolist())
