"""The map of differing tokens and columns in a report: the most telling pair, all ranks, in a few kilobytes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from distbench.pipeline.sent_rows import MOST_BYTES
from distbench.report.differences import differing_report
from distbench.verify.records import NO_DIFFERENCE, CellGrid, DifferingCells, Gathered, RowComparison, cell_grid
from tests.cases import tiny_case
from tests.observations import asked, seen

SOME = RowComparison(1, 1, 1)


def gathered(pairs: dict[str, RowComparison], cells: list[dict[str, DifferingCells]]) -> Gathered:
    resolved = asked()
    return Gathered(
        [seen(rank, resolved, difference_map=own) for rank, own in enumerate(cells)], pairs, {}, [], "rows", 0
    )


def test_counts_of_ranks_add_up_in_shared_cells() -> None:
    case = tiny_case(2, tokens=(65, 65), hidden_size=64)
    assert cell_grid(130, 64) == CellGrid(tokens=3, columns=2)
    line = [0] * 32
    first = DifferingCells(21, [[*line[:-1], 3]])
    second = DifferingCells(21, [[6, *line[2:], 3], [1, *line[1:]]])
    found = differing_report(
        gathered({"padded/truncated": SOME}, [{"padded/truncated": first}, {"padded/truncated": second}]), case
    )
    assert found is not None
    assert (len(found.cells), {len(text) for text in found.cells}) == (44, {32})
    assert found.cells[21] == "8" + "0" * 30 + "8"
    assert found.cells[22] == "2" + "0" * 31
    assert set("".join(found.cells[:21] + found.cells[23:])) == {"0"}


@pytest.mark.parametrize(
    ("unequal", "arms"),
    [
        ((), None),
        (("padded/control",), ("padded", "control")),
        (("padded/control", "padded/truncated"), ("padded", "truncated")),
        (("padded/truncated", "padded/oracle"), ("padded", "oracle")),
        (("padded/repadded",), ("padded", "repadded")),
    ],
)
def test_most_telling_pair_is_mapped(unequal: tuple[str, ...], arms: Any) -> None:
    names = ("padded/oracle", "padded/control", "padded/repadded", "repadded/truncated", "padded/truncated")
    pairs = {name: SOME if name in unequal else NO_DIFFERENCE for name in names}
    found = differing_report(gathered(pairs, [{}, {}]), tiny_case(2))
    assert (found and found.arms) == arms


def test_map_and_rows_sent_stay_within_64_kib() -> None:
    case = tiny_case(2, tokens=(4096, 4096), hidden_size=8192)
    cells = {"padded/truncated": DifferingCells(0, [[128 * 256] * 32 for _ in range(64)])}
    found = differing_report(gathered({"padded/truncated": SOME}, [cells]), case)
    assert found is not None
    assert set("".join(found.cells)) == {"8"}
    assert MOST_BYTES + len(msgspec.json.encode(found)) + 200 < 64 << 10
