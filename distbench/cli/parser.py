"""The parser of the command line: help on one screen, by group and by word, and suggestions for misspelt options."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from distbench.errors import InvalidCase
from distbench.utils.text import closest

ALL = "all"
_MOST_OPTIONS = 15
_GRAPH, _GRAPHS = "--graph", ("experts", "layer")
_SCREEN = 50
"""Lines that the help of a command may have before it leaves options out."""
_NAMES_AT = 13
_STANDARD = 2
"""argparse's own groups: positional arguments and options."""

Section = tuple[str | None, str | None, list[argparse.Action]]
"""Title, description and lines of a part of a help text."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InvalidCase.

    `--help=all` shows everything; `--help` too where that fits one screen, else the options outside groups, those of
    `common` (option and text by destination), and the names of the rest; `--help=WORD` a group, or the options with
    WORD in them. `listed` has commands with their one-line helps by group.
    """

    listed: Mapping[str, Mapping[str, str]] = {}
    common: Mapping[str, tuple[str, str]] = {}

    def __init__(self, **settings: Any) -> None:
        """Take the arguments of argparse.ArgumentParser."""
        super().__init__(**settings, add_help=False, formatter_class=_Formatter)
        self.add_argument(
            "-h", "--help", action=_Help, default=argparse.SUPPRESS, help="help: on a group, options with WORD, or all"
        )

    def group(self, title: str, text: str) -> Any:
        """The group of options with this title; a new one where there is none."""
        known = {group.title: group for group in self._action_groups}
        return known[title] if title in known else self.add_argument_group(title, text)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            InvalidCase: always; names the option and the command's help.

        """
        complaint = f"{message}; see `{self.prog} --help`"
        raise InvalidCase(complaint)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown arguments with the closest option of this command."""
        options, rest = super().parse_known_args(_with_graph(sys.argv[1:] if args is None else args), namespace)
        last = next(reversed(self._get_positional_actions()), None)
        if last is not None and last.nargs == "*" and not any(word.startswith("-") for word in rest):
            # argparse before Python 3.13 gives such an argument nothing where options stand before its words
            setattr(options, last.dest, [*getattr(options, last.dest), *rest])
            rest = []
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._suggestion(rest)}")
        return options, rest

    def help_of(self, word: str) -> str:
        """Help text for `--help=WORD`; the empty word is the one screen.

        Raises:
            InvalidCase: no group or option has the word.

        """
        every = [(group.title, group.description, _visible(group)) for group in self._action_groups]
        if word == ALL:
            return self._help(every)
        if word:
            return self._help([one for one in every if one[0] == word] or self._having(word), head=False)
        full = self._help(every)
        if full.count("\n") <= _SCREEN:
            return full
        dests = [action.dest for _, _, actions in every[_STANDARD:] for action in actions]
        often = _listed("most used", dict(self.common[dest] for dest in self.common if dest in dests))
        return self._help([*every[:_STANDARD], often]) + self._rest(every[_STANDARD:])

    def format_help(self) -> str:
        """The one screen of help."""
        return self.help_of("")

    def _having(self, word: str) -> list[Section]:
        """Options with a word in flag, value or text."""
        found = [
            action
            for group in self._action_groups
            for action in _visible(group)
            if word.lower() in " ".join([*action.option_strings, str(action.metavar), action.help or ""]).lower()
        ]
        if not found:
            known = [ALL, *(str(group.title) for group in self._action_groups[_STANDARD:])]
            flags = (flag.lstrip("-") for flag in self._option_string_actions)
            self.error(f"--help={word}: in no option{closest(word, [*known, *flags])}; groups are {', '.join(known)}")
        return [(f"options with {word!r}", None, found)]

    def _help(self, sections: Iterable[Section], *, head: bool = True) -> str:
        formatter = self._get_formatter()
        if head:
            positional = " ".join(str(action.metavar or action.dest) for action in self._get_positional_actions())
            formatter.add_text(f"usage: {self.usage or f'{self.prog} [OPTIONS] {positional}'.rstrip()}")
            formatter.add_text(self.description)
        for title, text, actions in [*(_listed(*group) for group in self.listed.items()), *sections]:
            formatter.start_section(title)
            formatter.add_text(text)
            formatter.add_arguments(actions)
            formatter.end_section()
        if head:
            formatter.add_text(self.epilog)
        return formatter.format_help()

    def _rest(self, sections: Iterable[Section]) -> str:
        """Flags that the one screen leaves out, by group."""
        formatter = _Formatter(self.prog, max_help_position=_NAMES_AT)
        formatter.start_section(f"more, by --help=GROUP, or --help={ALL}")
        for title, _, actions in sections:
            flags = " ".join(_long(action) for action in actions if action.dest not in self.common)
            formatter.add_arguments([_Entry(str(title), flags)] if flags else [])
        formatter.end_section()
        return "\n" + formatter.format_help()

    def _suggestion(self, rest: Sequence[str]) -> str:
        flag = next((one.partition("=")[0] for one in rest if one.startswith("--")), None)
        return "" if flag is None else closest(flag, self._option_string_actions)


def _with_graph(words: Sequence[str]) -> list[str]:
    """The words with the value of --graph joined to it: experts where none of its values follows."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == _GRAPH:
            found[-1] = f"{_GRAPH}={word if word in _GRAPHS else _GRAPHS[0]}"
            found += [] if word in _GRAPHS else [word]
        else:
            found.append(word)
    return [f"{_GRAPH}={_GRAPHS[0]}" if word == _GRAPH else word for word in found]


def _listed(title: str, lines: Mapping[str, str]) -> Section:
    return title, None, [_Entry(*line) for line in lines.items()]


def _long(action: argparse.Action) -> str:
    """First long form of an option."""
    return next(flag for flag in action.option_strings if flag.startswith("--"))


def _visible(group: Any) -> list[argparse.Action]:
    return [action for action in group._group_actions if action.help != argparse.SUPPRESS]  # noqa: SLF001 - no other way


class _Formatter(argparse.HelpFormatter):
    """As Python 3.13 writes help, on any Python: `-n, --nproc RANKS`; no option is broken at a hyphen."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        shown = f"[={value[1:]}" if value.startswith("[") else f" {value}"
        return ", ".join(action.option_strings) + shown

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], **settings: Any) -> None:
        super().__init__(option_strings, nargs="?", const="", metavar="WORD", **settings)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, __: str | None = None) -> None:
        assert isinstance(parser, Parser)  # noqa: S101
        sys.stdout.write(parser.help_of(values))
        parser.exit()


class _Entry(argparse.Action):
    """A line of a help text that is no option: a name and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__((), name, metavar=name, help=text.replace("%", "%%"))

    def __call__(self, *_: Any) -> None:
        """Never called: it is no option."""
