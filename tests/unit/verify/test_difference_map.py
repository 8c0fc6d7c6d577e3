"""Counts of differing elements by cells of tokens and columns: none lost, each at its place."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from distbench.verify.difference_map import count_cells, differing_cells
from distbench.verify.records import MAP_COLUMNS, MAP_TOKENS, cell_grid
from distbench.verify.row_compare import compare_rows


@given(st.integers(0, 10**7), st.integers(1, 10**5))
def test_grid_is_the_finest_of_its_size(tokens: int, columns: int) -> None:
    grid = cell_grid(tokens, columns)
    assert -(-tokens // grid.tokens) <= MAP_TOKENS
    assert -(-columns // grid.columns) <= MAP_COLUMNS
    assert grid.tokens == 1 or -(-tokens // (grid.tokens - 1)) > MAP_TOKENS
    assert grid.columns == 1 or -(-columns // (grid.columns - 1)) > MAP_COLUMNS


@given(st.integers(1, 40), st.integers(0, 300), st.integers(0, 99), st.integers(1, 100), st.integers(0, 9))
def test_every_differing_element_is_counted_at_its_place(
    rows: int, before: int, after: int, hidden: int, seed: int
) -> None:
    wrong = torch.rand(rows, hidden, generator=torch.Generator().manual_seed(seed)) < 0.2
    grid = cell_grid(before + rows + after, hidden)
    found = count_cells(wrong, before, grid)
    expected: dict[tuple[int, int], int] = {}
    for row, column in wrong.nonzero().tolist():
        cell = ((before + row) // grid.tokens, column // grid.columns)
        expected[cell] = expected.get(cell, 0) + 1
    counts = {
        (found.first + row, column): count
        for row, line in enumerate(found.counts)
        for column, count in enumerate(line)
        if count
    }
    assert counts == expected
    assert found.first + len(found.counts) <= MAP_TOKENS


def test_only_pairs_that_differ_have_cells() -> None:
    right = torch.zeros(3, 8, dtype=torch.bfloat16)
    wrong = right.clone()
    wrong[2, 5] = -0.0
    outputs = {"padded": right, "control": right.clone(), "truncated": wrong}
    pairs = {f"padded/{name}": compare_rows(outputs[name], right) for name in ("control", "truncated")}
    (found,) = differing_cells(outputs, pairs, (4, 3), 1).items()
    assert found[0] == "padded/truncated"
    assert (found[1].first, found[1].counts[2][5], sum(map(sum, found[1].counts))) == (4, 1, 1)
