"""The table of ranks: the worst first, ranks that say the same in one row, columns that say the same in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distbench.case.stages import Arm
from distbench.report.schema import RankReport
from distbench.report.terminal import Grid
from distbench.utils.text import counted, numbers

_MOST_ROWS = 16
_KEPT = ("tokens", "total_recv", "lost rows")
OTHER_CODE = "*"

Row = dict[str, str]


def rank_parts(ranks: Sequence[RankReport], *, every: bool = False) -> list[str | Grid]:
    """Table of the ranks, with a line for what all have in common; `every` rank has a row of its own where asked."""
    rows = [_row(rank) for rank in ranks]
    shared = {
        name: value for name, value in rows[0].items() if name not in _KEPT and all(row[name] == value for row in rows)
    }
    columns = tuple(name for name in rows[0] if name not in shared)
    cells = [tuple(row[name] for name in columns) for row in rows]
    line = f"all ranks: {', '.join(f'{name} {value}' for name, value in shared.items())}" if shared else ""
    if every:
        told = [(str(rank.rank), *row) for rank, row in zip(ranks, cells, strict=True)]
        return [*([line] if line else []), Grid(("rank", *columns), told)]
    groups = _alike(ranks, cells)
    shown, rest = groups[:_MOST_ROWS], groups[_MOST_ROWS:]
    told = [(numbers([rank.rank for rank in group]), *row) for row, group in shown]
    parts: list[str | Grid] = [line] if line else []
    parts.append(Grid(("rank", *columns), told))
    return [*parts, *([_rest_line([rank for _, group in rest for rank in group])] if rest else [])]


def _alike(
    ranks: Sequence[RankReport], cells: Sequence[tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[RankReport]]]:
    """Ranks by what their rows say: those that lose the most first, and where rows are left out the fullest next."""
    groups: dict[tuple[str, ...], list[RankReport]] = {}
    for rank, row in zip(ranks, cells, strict=True):
        groups.setdefault(row, []).append(rank)
    many = len(groups) > _MOST_ROWS
    return sorted(groups.items(), key=lambda one: (-one[1][0].lost_rows, -one[1][0].total_recv if many else 0))


def _rest_line(ranks: Sequence[RankReport]) -> str:
    received = [rank.total_recv for rank in ranks]
    tokens = [rank.tokens for rank in ranks]
    lost = sum(rank.lost_rows for rank in ranks)
    return (
        f"{counted(len(ranks), 'more rank')}: {min(tokens)} to {counted(max(tokens), 'token')}, total_recv "
        f"{min(received)} to {max(received)}, {counted(lost, 'lost row')}; distbench show -v shows all"
    )


def _row(rank: RankReport) -> Row:
    return {
        "host": rank.host,
        "device": rank.device,
        "tokens": str(rank.tokens),
        "total_recv": str(rank.total_recv),
        "capacity": str(rank.capacity),
        "limit": "off" if rank.limit is None else str(rank.limit),
        "kernel padded → truncated": _kernels(rank.kernels[Arm.PADDED], rank.kernels.get(Arm.TRUNCATED)),
        "lost rows": str(rank.lost_rows),
    }


def _kernels(padded: dict[str, Any], truncated: dict[str, Any] | None) -> str:
    return f"{padded['label']} → {label_beside(truncated, padded) if truncated else 'not run'}"


def label_beside(kernel: dict[str, Any], padded: dict[str, Any]) -> str:
    """Label of a kernel, marked where the padded kernel has the same label but other code."""
    other = any(kernel[stage] != padded[stage] for stage in ("stage1", "stage2"))
    label: str = kernel["label"]
    return label + OTHER_CODE * (other and label == padded["label"])
