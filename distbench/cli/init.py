"""`distbench init`: a commented case or suite file to start from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distbench.case.presets import PRESETS
from distbench.case.templates import case_template, suite_template
from distbench.errors import InvalidCase
from distbench.report.terminal import print_line

_SUFFIX = ".toml"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "init",
        description="Write a commented file to start from: a case with every key, or with --suite a suite. A file that "
        "exists is kept.",
    )
    command.add_argument("file", metavar="FILE", nargs="?", help="the file (default: case.toml, or suite.toml)")
    command.add_argument("--suite", action="store_true", help="a suite instead of a case")
    command.add_argument(
        "--model", choices=tuple(PRESETS), default="tiny", metavar="NAME", help="its layer (default: %(default)s)"
    )
    command.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> int:
    kind = "suite" if options.suite else "case"
    path = Path(options.file or f"{kind}{_SUFFIX}")
    if path.suffix != _SUFFIX:
        message = f"init {path}: suffix {path.suffix!r}; the file is TOML, name it {path.with_suffix(_SUFFIX)}"
        raise InvalidCase(message)
    text = (suite_template if options.suite else case_template)(str(path), options.model)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        message = f"init {path}: cannot be written ({error.strerror}); name another file"
        raise InvalidCase(message) from error
    run = f"suite {path} -n 4" if options.suite else f"run --case {path}"
    print_line(f"{path}: a {kind} of the layer {options.model}; run it: distbench {run}")
    return 0
