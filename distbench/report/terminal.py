"""Lines, tables and JSON on standard output and error: within the width of a terminal, harmless to it, in any encoding.

A table that is too wide wraps its columns of words; one that is still too wide becomes a paragraph for each row. No
number is cut. In a pipe, lines are as long as they are, and tables have at most 140 columns.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from distbench.utils.streams import plain, speaks_all
from distbench.utils.text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_LOG_WIDTH = 140
_LEAST_WIDTH = 40
_GAP, _EDGES = 3, 2
"""Columns of the screen between two columns of a table, and at its edges together."""
_WORDS = 24
"""A column that is wider than this and has blanks in it may wrap."""
_STYLES = {"NO": "bold red", "FAIL": "bold red"}


def print_line(text: str) -> None:
    """Print one line to standard output at once; non-printable characters are escaped."""
    print(printable(text), flush=True)


def print_json(document: Any) -> None:
    """Print a document to standard output as JSON, escaped so that no terminal acts on it and any encoding has it."""
    import msgspec  # noqa: PLC0415 - lists start without it

    text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    any_character = speaks_all(sys.stdout)
    kept = (one == "\n" or (one.isprintable() and (any_character or one.isascii())) for one in text)
    print("".join(one if keep else json.dumps(one)[1:-1] for one, keep in zip(text, kept, strict=True)), flush=True)


def print_note(text: str) -> None:
    """Report progress on standard error."""
    print(printable(f"distbench: {text}"), file=sys.stderr, flush=True)


def print_error(ending: str, message: str) -> None:
    """Print one line to standard error: the ending of the run, and its cause."""
    print(printable(f"distbench: {ending}: {message}"), file=sys.stderr, flush=True)


class Grid(NamedTuple):
    """A table: its columns, its rows, and a line above it."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""


def print_table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...], title: str = "") -> None:
    """Print a table to standard output; non-printable characters are escaped."""
    print_parts([Grid(columns, rows, title)])


def print_parts(parts: Iterable[str | Grid]) -> None:
    """Print lines, wrapped at words on a terminal, and tables to standard output."""
    console = _console()
    for part in parts:
        if isinstance(part, str):
            _print_wrapped(console, part)
            continue
        if part.title:
            _print_wrapped(console, part.title)
        for one in laid_out(part.columns, part.rows, console.width):
            console.print(one, markup=False, soft_wrap=isinstance(one, str))


def print_verdict(line: str, *, good: bool) -> None:
    """Print the last line of a report, green or red where the terminal has colours."""
    _print_wrapped(_console(), line, "bold green" if good else "bold red")


def _print_wrapped(console: Console, line: str, style: str = "") -> None:
    told = _told(line)
    lines = textwrap.wrap(told, console.width, break_on_hyphens=False) if console.is_terminal else [told]
    for one in lines or [""]:
        console.print(one, style=style, markup=False, soft_wrap=True)


def laid_out(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], width: int) -> list[RenderableType]:
    """A table of at most `width` columns, or where none fits a paragraph for each row."""
    told = [tuple(map(_told, row)) for row in rows]
    heads = tuple(map(_told, columns))
    cells = [[row[index] for row in told] for index in range(len(heads))]
    wraps = [max(map(len, column), default=0) > _WORDS and any(" " in cell for cell in column) for column in cells]
    least = [
        max(*(_longest_word(cell) if wrap else len(cell) for cell in column), _longest_word(head), _WORDS * wrap)
        if column
        else _longest_word(head)
        for column, head, wrap in zip(cells, heads, wraps, strict=True)
    ]
    if sum(least) + _GAP * (len(heads) - 1) + _EDGES > width:
        return [_paragraph(heads, row, width) for row in told]
    natural = [max(map(len, (head, *column))) for head, column in zip(heads, cells, strict=True)]
    if sum(natural) + _GAP * (len(heads) - 1) + _EDGES > width:
        heads = tuple("\n".join(textwrap.wrap(head, size)) for head, size in zip(heads, least, strict=True))
    return [_table(heads, told, least, wraps)]


def _paragraph(heads: tuple[str, ...], row: tuple[str, ...], width: int) -> str:
    """A row as `head value` pairs; the first stands out, the others are indented below it."""
    pairs = [f"{head}\0{cell}".replace(" ", "\0") for head, cell in zip(heads[1:], row[1:], strict=True)]
    first = textwrap.wrap(f"{heads[0]} {row[0]}", width, subsequent_indent="  ", break_on_hyphens=False)
    wrapped = textwrap.wrap(", ".join(pairs), width - 2, break_on_hyphens=False, break_long_words=False)
    rest = [line for part in wrapped for line in textwrap.wrap(part.replace("\0", " "), width - 2)]
    return "\n".join([*first, *(f"  {line}" for line in rest)])


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], least: list[int], wraps: list[bool]) -> Any:
    """A rich table; columns of numbers are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(heads):
        numbers = index > 0 and all(_is_number(row[index]) for row in rows)
        side = "right" if numbers else "left"
        table.add_column(head, justify=side, no_wrap=not wraps[index], min_width=least[index], overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "-+." or cell in ("off", "NaN")


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

    console = Output(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
    console.width = max(console.width, _LEAST_WIDTH)
    return console
