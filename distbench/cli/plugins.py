"""`distbench plugins`: transports, experts and callers by name."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.case.plugins import FAULT, KINDS, installed
from distbench.report.terminal import print_table


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "plugins",
        description="List the names that --transport, --experts and --caller take: built-in ones, and entry points of "
        "installed packages, none of which is loaded; and installed faults for --inject, beside `distbench faults`. A "
        "package.module:factory needs no entry point (docs/plugins.md).",
    )
    command.set_defaults(command=_plugins)


def _plugins(_: argparse.Namespace) -> int:
    print_table([row for part in (*KINDS, FAULT) for row in _rows(part)], ("part", "name", "package", "where"))
    return 0


def _rows(part: str) -> list[tuple[str, str, str, str]]:
    built_in = KINDS[part].built_in if part in KINDS else {}
    rows = [(part, name, "distbench", reference) for name, reference in built_in.items()]
    for name, entry in sorted(installed(part).items()):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""
        rows.append((part, name, package, entry.value))
    return rows
