"""Results in the formats that a cluster's tools read, each written from the same journal (docs/outputs.md)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar

from distbench.errors import InvalidCase, Unsupported
from distbench.utils.text import shown

if TYPE_CHECKING:
    from distbench.report.results import Results

FILES = {
    "html": "results.html",
    "junit": "junit.xml",
    "md": "results.md",
    "csv": "results.csv",
    "prom": "results.prom",
    "json": "results.json",
}
"""Formats, and the name of each one's file in the folder of the results."""

STANDARD_OUTPUT = Path("-")
"""The path that stands for standard output."""

_MODULES = {
    "html": "page",
    "junit": "junit",
    "md": "markdown",
    "csv": "table",
    "prom": "prometheus",
    "json": "document",
}

Content = TypeVar("Content")
Writer: TypeAlias = "Callable[[Results, BinaryIO], None]"
Targets = Mapping[str, Path]


def parse_targets(text: str, out: Path) -> Targets:
    """Files of the formats in `junit,md=summary.md,…`; one without a path goes into `out`.

    `-` as a path is STANDARD_OUTPUT.

    Raises:
        InvalidCase: an unknown or repeated format, an empty path, or one that two formats share.

    """
    targets: dict[str, Path] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = part.partition("=")
        if name not in FILES or name in targets or (equals and not path):
            message = f"report {shown(part)}: allowed are {', '.join(FILES)}, each once, or FORMAT=PATH"
            raise InvalidCase(message)
        target = Path(path) if path else out / FILES[name]
        if target in targets.values():
            message = f"report {shown(part)}: another format is written to {target} already; name another file"
            raise InvalidCase(message)
        targets[name] = target
    return targets


def load_writers(targets: Targets, package: str = __name__) -> dict[Path, Any]:
    """Load the writers of these formats, so that a missing library is known before a rank starts.

    They are modules of `package`, and write the objects that it exports: results by default.

    Raises:
        InvalidCase: `package` does not write one of the formats.
        Unsupported: a library is missing; names it.

    """
    written = [name for name, module in _MODULES.items() if find_spec(f"{package}.{module}")]
    for name in targets:
        if name not in written:
            message = f"report {name}: this command does not write it; allowed are {', '.join(written)}"
            raise InvalidCase(message)
    return {path: _writer(package, name) for name, path in targets.items()}


def write_reports(content: Content, writers: Mapping[Path, Callable[[Content, BinaryIO], None]]) -> None:
    """Write the files, each of them whole or not at all.

    Raises:
        InvalidCase: the results cannot be read, or a file cannot be written.

    """
    for path, write in writers.items():
        _write(content, path, write)


def _write(content: Content, path: Path, write: Callable[[Content, BinaryIO], None]) -> None:
    if path == STANDARD_OUTPUT:
        text = BytesIO()
        write(content, text)
        sys.stdout.flush()
        sys.stdout.buffer.write(text.getvalue())  # UTF-8, as in a file: XML says so in its first line
        sys.stdout.buffer.flush()
        return
    from distbench.report.files import atomic_file  # noqa: PLC0415 - the parser loads this module for its formats

    try:
        with atomic_file(path) as file:
            write(content, file)
    except OSError as error:
        message = f"report {path}: {error.strerror}; name another file"
        raise InvalidCase(message) from error


def _writer(package: str, name: str) -> Any:
    try:
        return import_module(f"{package}.{_MODULES[name]}").write
    except ModuleNotFoundError as error:
        message = f"report {name}: needs the package of {error.name}, which is not installed; run: make setup"
        raise Unsupported(message) from error
