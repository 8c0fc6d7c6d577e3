"""`distbench completion`: a script that completes commands, options and names in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from distbench.errors import Unsupported

if TYPE_CHECKING:
    from distbench.cli.parser import Parser

_SHELLS = ("bash", "zsh", "fish")
_FILES = ("FILE", "PATH", "CSV", "REPORT", "CASE|REPORT", "DIR|FILE", "OLD", "NEW", "FOLDER")
_FOLDERS = ("DIR", "BUNDLE")
_SUITES = "FILE|NAME"
_FUNCTION = "_distbench_suites"
"""The function of bash that completes suites: their names, and files."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "completion",
        description="Print a script that completes commands, options, names and files. bash, in ~/.bashrc: "
        'eval "$(distbench completion bash)". zsh: distbench completion zsh > DIR/_distbench, with DIR in $fpath. '
        "fish: distbench completion fish > ~/.config/fish/completions/distbench.fish.",
    )
    command.add_argument("shell", choices=_SHELLS, metavar="|".join(_SHELLS), help="the shell")
    command.set_defaults(command=_completion)


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        message = f"completion: needs {error.name}, which is not installed; run: make setup"
        raise Unsupported(message) from error
    from distbench.report.terminal import print_script

    suites = " ".join(_suites())
    function = f'{_FUNCTION}() {{ compgen -W "{suites}" -- "$1"; compgen -f -- "$1"; }}\n'
    preamble = function if options.shell == "bash" else ""
    print_script(shtab.complete(_whole_parser(), options.shell, preamble=preamble))
    return 0


class _Described:
    """Subparsers that have their one-line help, without which no script has them."""

    def __init__(self, commands: Any, helps: dict[str, str]) -> None:
        self._commands, self._helps = commands, helps

    def add_parser(self, name: str, **settings: Any) -> Parser:
        parser: Parser = self._commands.add_parser(name, help=self._helps[name].replace("%", "%%"), **settings)
        return parser


def _whole_parser() -> argparse.ArgumentParser:
    """Parser of all commands, whose options know the names that they take."""
    from distbench.cli.main import COMMANDS
    from distbench.cli.parser import Parser

    helps = {name: text for group in COMMANDS.values() for name, text in group.items()}
    parser = Parser(prog="distbench")
    parser.add_argument("--version", action="version", version="")
    commands = parser.add_subparsers(prog="distbench", metavar="COMMAND")
    for name in helps:
        import_module(f"distbench.cli.{name}").add(_Described(commands, helps))
    _learn((parser, *commands.choices.values()))
    return parser


def _learn(parsers: Iterable[argparse.ArgumentParser]) -> None:
    """Set what the options of the parsers take: choices, files, or folders."""
    import shtab

    names = _names()
    suites = " ".join(_suites())
    a_suite = {
        "bash": _FUNCTION,
        "zsh": f"{{_alternative 'suites:suite:({suites})' 'files:file:_files'}}",
        "fish": f"{suites} (__fish_complete_path)",
    }
    known: dict[str, Any] = dict.fromkeys(_FILES, shtab.FILE) | dict.fromkeys(_FOLDERS, shtab.DIRECTORY)
    known[_SUITES] = a_suite
    for parser in parsers:
        for action in parser._actions:  # noqa: SLF001 - argparse has no other way to them
            if action.dest == "help":
                action.nargs = 0
            elif action.choices is None and action.nargs != 0:
                action.choices = names.get(action.dest)
            if action.metavar in known:
                action.complete = known[str(action.metavar)]  # type: ignore[attr-defined]


def _names() -> dict[str, Any]:
    """Names that options and arguments take, by destination."""
    from typing import get_args

    from distbench.case.groups import UNITS
    from distbench.case.plugins import KINDS
    from distbench.case.presets import PRESETS
    from distbench.case.profiles import PROFILES
    from distbench.case.spec import FIELD_HINTS
    from distbench.faults.catalogue import listed_faults

    words = {f"case_{key}": get_args(get_args(FIELD_HINTS[key])[0]) for key, unit in UNITS.items() if not unit}
    words = {dest: found for dest, found in words.items() if found}
    words |= {f"case_{part}": tuple(kind.built_in) for part, kind in KINDS.items()}
    words["case_graph"] = ("experts", "layer")
    faults = tuple(fault.name for fault in listed_faults())
    limits = ("off", "max-recv", "max-recv-1", "sum", "sum32", "pow2", "capacity")
    return words | {
        "case_model": tuple(PRESETS),
        "case_profile": tuple(PROFILES),
        "case_inject": faults,
        "case_limit": limits,
        "name": faults,
    }


def _suites() -> tuple[str, ...]:
    from distbench.case.suite_file import builtin_suites

    return tuple(builtin_suites())
