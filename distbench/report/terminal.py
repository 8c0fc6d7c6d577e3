"""Lines, tables and JSON on standard output and error: within the width of a terminal, harmless to it, in any encoding.

A table that is too wide wraps its columns of words; one that is still too wide becomes a paragraph for each row. No
number is cut. In a pipe, lines are as long as they are, and tables have at most 140 columns.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distbench.errors import OUT_OF_TIME
from distbench.report.progress import aside
from distbench.utils.streams import plain, speaks_all
from distbench.utils.text import printable
from distbench.utils.voice import Voice, voice

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_LOG_WIDTH = 140
_LEAST_WIDTH = 40
_GAP = 3
"""Columns of the screen between two columns of a table."""
_INDENT = 2
_WRAPPED: dict[str, Any] = {"break_on_hyphens": False, "drop_whitespace": True}
_WORDS, _FEW = 16, 8
"""A column of words that is wider than the first may wrap; where no table fits, any that is wider than the second."""
_COLOURS = {2: "bold yellow", OUT_OF_TIME: "bold yellow", 77: "bold yellow"}
"""Colours of exit codes other than 0 that are no wrong result."""
_NUMBERS = re.compile(r"(?:[\d.,/()+-]|e[+-]| | to )*", re.ASCII)
"""Numbers, also several: `3/4`, `0.99 to 1.01`, `0-7`, and no cell at all."""
_ASCII_LINES = "    \n    \n -- \n    \n    \n    \n    \n    \n"
"""A line below the head, as rich describes a box: where the locale has no more than ASCII."""
_STYLES = {"NO": "bold red", "FAIL": "bold red"}


def print_line(text: str) -> None:
    """Print one line to standard output at once; non-printable characters are escaped."""
    with aside():
        print(printable(text), flush=True)


def print_text(*lines: str) -> None:
    """Print lines to standard output, wrapped at words where it is a terminal; their continuations are indented."""
    for line in lines:
        told = printable(line)
        indent = " " * (len(told) - len(told.lstrip()) + _INDENT)
        if sys.stdout.isatty():
            width = max(shutil.get_terminal_size().columns, _LEAST_WIDTH)
            told = "\n".join(textwrap.wrap(told, width, subsequent_indent=indent, **_WRAPPED)) or told
        with aside():
            print(told, flush=True)


def print_script(text: str) -> None:
    """Print a program for a shell to standard output, as it is."""
    print(text)


def print_json(document: Any) -> None:
    """Print a document to standard output as JSON, escaped so that no terminal acts on it and any encoding has it."""
    import msgspec  # noqa: PLC0415 - lists start without it

    text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    any_character = speaks_all(sys.stdout)
    kept = (one == "\n" or (one.isprintable() and (any_character or one.isascii())) for one in text)
    print("".join(one if keep else json.dumps(one)[1:-1] for one, keep in zip(text, kept, strict=True)), flush=True)


def print_note(text: str) -> None:
    """Print a line to standard error that does not belong to the result, such as a warning."""
    with aside():
        print(printable(f"distbench: {text}"), file=sys.stderr, flush=True)


def print_step(text: str) -> None:
    """Print a step of long work to standard error, unless the command is quiet."""
    if voice() is not Voice.QUIET:
        print_note(text)


def print_error(ending: str, message: str) -> None:
    """Print one line to standard error: the ending of the run, and its cause."""
    with aside():
        print(printable(f"distbench: {ending}: {message}"), file=sys.stderr, flush=True)


class Grid(NamedTuple):
    """A table: its columns, its rows, and a line above it."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""


def folded(grid: Grid, kept: Sequence[str] = ()) -> list[str | Grid]:
    """The table without the columns that say the same in all of several rows, and a line above it for those.

    The first column stays, and so do those of `kept`; what is empty, or a hyphen, in all rows is left out.
    """
    rows = grid.rows
    alike = [
        index
        for index, name in enumerate(grid.columns)
        if index and len(rows) > 1 and name not in kept and len({row[index] for row in rows}) == 1
    ]
    said = [f"{grid.columns[index]} {rows[0][index]}" for index in alike if rows[0][index] not in ("", "-")]
    left = [index for index in range(len(grid.columns)) if index not in alike]
    columns = tuple(grid.columns[index] for index in left)
    table = Grid(columns, [tuple(row[index] for index in left) for row in rows], grid.title)
    return [*([f"all rows: {', '.join(said)}"] if said else []), table]


def print_table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...], title: str = "") -> None:
    """Print a table to standard output; non-printable characters are escaped."""
    print_parts([Grid(columns, rows, title)])


def print_parts(parts: Iterable[str | Grid]) -> None:
    """Print lines, wrapped at words on a terminal, and tables to standard output."""
    console = _console()
    blank = False
    with aside():
        for part in parts:
            if isinstance(part, str):
                _print_wrapped(console, part)
                blank = False
            else:
                _print_grid(console, part, blank=blank)
                blank = True


def _print_grid(console: Console, grid: Grid, *, blank: bool) -> None:
    """Print a table between blank lines; the first is there already where the last line was `blank`."""
    if grid.title:
        _print_wrapped(console, grid.title)
    if grid.title or not blank:
        print()
    for one in laid_out(grid.columns, grid.rows, console.width):
        with console.capture() as drawn:
            console.print(one, markup=False, soft_wrap=isinstance(one, str))
        print("\n".join(line.rstrip() for line in drawn.get().splitlines()))
    print()


def print_verdict(line: str, exit_code: int) -> None:
    """Print the line that an output ends with: green for exit code 0, yellow where nothing is wrong or right, else red.

    Only a terminal has colours, unless NO_COLOR is set there.
    """
    with aside():
        _print_wrapped(_console(), line, "bold green" if not exit_code else _COLOURS.get(exit_code, "bold red"))


def _print_wrapped(console: Console, line: str, style: str = "") -> None:
    told = _told(line)
    lines = textwrap.wrap(told, console.width, **_WRAPPED) if sys.stdout.isatty() else [told]
    for one in lines or [""]:
        console.print(one, style=style, markup=False, soft_wrap=True)


def laid_out(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], width: int) -> list[RenderableType]:
    """A table of at most `width` columns; where none fits, a paragraph for each row.

    First columns of words may wrap; where that is not enough, all that have a blank.
    """
    told = [tuple(map(_told, row)) for row in rows]
    heads = tuple(map(_told, columns))
    cells = [[row[index] for row in told] for index in range(len(heads))]
    room = width - _GAP * (len(heads) - 1)
    words = [not all(map(is_number, column)) for column in cells]
    for shortest, may in ((_WORDS, words), (_FEW, [True] * len(heads))):
        wraps = [
            one and max(map(len, column), default=0) > shortest and any(" " in cell for cell in column)
            for one, column in zip(may, cells, strict=True)
        ]
        least = [
            max([_longest_word(head), *(_least_width(cell, shortest if wrap else 0) for cell in column)])
            for column, head, wrap in zip(cells, heads, wraps, strict=True)
        ]
        if sum(least) <= room:
            whole = [max(map(len, column), default=0) for column in cells]
            return [_table(heads, told, _widths(least, whole, list(map(len, heads)), room))]
    return [_paragraph(heads, row, width) for row in told]


def _widths(least: list[int], whole: list[int], heads: list[int], room: int) -> list[int]:
    """Widths of the columns: what is left of the room goes to those whose cells lack the most, then to whole heads."""
    widths = list(least)
    while sum(widths) < room:
        lacking = [wide - now for wide, now in zip(whole, widths, strict=True)]
        if max(lacking) <= 0:
            break
        widths[lacking.index(max(lacking))] += 1
    for index in sorted(range(len(heads)), key=lambda one: heads[one] - widths[one]):
        if sum(widths) - widths[index] + heads[index] <= room:
            widths[index] = max(widths[index], heads[index])
    return widths


def _least_width(cell: str, shortest: int) -> int:
    """Columns that a cell needs, which may wrap down to `shortest` columns; 0: it may not."""
    return max(_longest_word(cell), min(len(cell), shortest)) if shortest else len(cell)


def _paragraph(heads: tuple[str, ...], row: tuple[str, ...], width: int) -> str:
    """A row as `head value` pairs; the first stands out, the others are indented below it."""
    pairs = [
        f"{head}\0{cell}".replace(" ", "\0")
        for head, cell in zip(heads[1:], row[1:], strict=True)
        if cell not in ("", "-")
    ]
    first = textwrap.wrap(f"{heads[0]} {row[0]}", width, subsequent_indent="  ", break_on_hyphens=False)
    wrapped = textwrap.wrap(", ".join(pairs), width - 2, break_on_hyphens=False, break_long_words=False)
    rest = [line for part in wrapped for line in textwrap.wrap(part.replace("\0", " "), width - 2)]
    return "\n".join([*first, *(f"  {line}" for line in rest)])


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], widths: list[int]) -> Any:
    """A rich table; columns of numbers are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = box.SIMPLE_HEAD if speaks_all(sys.stdout) else box.Box(_ASCII_LINES, ascii=True)
    table = Table(box=lines, pad_edge=False, show_edge=False)
    for index, head in enumerate(heads):
        numbers = index > 0 and all(is_number(row[index]) for row in rows)
        side = "right" if numbers else "left"
        table.add_column(head, justify=side, width=widths[index], overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table


def is_number(cell: str) -> bool:
    """Whether a cell has figures and no words; columns of such cells are aligned to the right."""
    return cell in ("off", "NaN") or _NUMBERS.fullmatch(cell) is not None


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _told(text: str) -> str:
    """Text that standard output can show."""
    return plain(printable(text), sys.stdout)


def _console() -> Console:
    """Console on standard output. A broken pipe is left to the CLI: rich would exit with 1."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    live = sys.stdout.isatty()
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    console = Output(highlight=False, emoji=False, width=None if live else _LOG_WIDTH, color_system=colours)
    console.width = max(console.width, _LEAST_WIDTH)
    return console
