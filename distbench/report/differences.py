"""The map of differing tokens and columns: one pair of arms, the most telling one, summed over all ranks."""

from __future__ import annotations

from distbench.case.spec import Case
from distbench.report.schema import DifferingReport
from distbench.verify.records import Gathered, cell_grid

LEVELS = 8
"""Digit of a cell in which all elements differ."""

_ORDER = (
    "padded/oracle",
    "padded/truncated",
    "truncated/production",
    "padded/production",
    "production/oracle",
    "padded/control",
)
"""Pairs in the order in which they tell: a wrong baseline first, then the cut, the caller, bits that do not repeat."""


def differing_report(gathered: Gathered, case: Case) -> DifferingReport | None:
    """The map of the first pair that is not equal; None where all are."""
    unequal = [name for name, found in gathered.comparisons.items() if not found.equal]
    pair = next((name for name in (*_ORDER, *unequal) if name in unequal), None)
    if pair is None:
        return None
    grid = cell_grid(sum(case.tokens), case.hidden_size)
    tokens, columns = -(-sum(case.tokens) // grid.tokens), -(-case.hidden_size // grid.columns)
    counts = [[0] * columns for _ in range(tokens)]
    for found in (record.difference_map[pair] for record in gathered.observations if pair in record.difference_map):
        for row, own in enumerate(found.counts, found.first):
            counts[row] = [count + more for count, more in zip(counts[row], own, strict=True)]
    high = [min(grid.tokens, sum(case.tokens) - row * grid.tokens) for row in range(tokens)]
    wide = [min(grid.columns, case.hidden_size - column * grid.columns) for column in range(columns)]
    first, second = pair.split("/")
    return DifferingReport(
        arms=(first, second),
        tokens_per_cell=grid.tokens,
        columns_per_cell=grid.columns,
        cells=[
            "".join(str(-(-LEVELS * count // (tall * broad))) for count, broad in zip(row, wide, strict=True))
            for row, tall in zip(counts, high, strict=True)
        ],
    )
