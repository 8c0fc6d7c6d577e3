#!/usr/bin/env python3
"""Find phrases that have a plainer form in docstrings, comments, strings and Markdown.

Exit code 1, with the place of each phrase, if there are more than 3 per 1,000 lines of prose.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PATHS = ("distbench", "tests", "scripts", "docs", "README.md")
MOST = 3.0


class Rule(NamedTuple):
    """A phrase, and what to write for it."""

    pattern: re.Pattern[str]
    plain: str


def _rule(pattern: str, plain: str) -> Rule:
    """Compile a pattern whose spaces also match the end of a line, of any case."""
    return Rule(re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), plain)


RULES = (
    _rule(r"\A\s*Returns? (what|how|who|where)\b", "the noun first: 'Rows per expert, int64 [E].'"),
    _rule(r"(\A\s*|[.]\s+)(?-i:What) (is|was|are|were)\b[^.,;:]*\b(is|was|are|were)\b", "subject, verb, object"),
    _rule(r"\bwhat (is|was|does|has|they|it|a|the)\b[^.]*\b(is|are|was) what\b", "name the thing"),
    _rule(r"\bso (many|much|often)\b", "the number, or its name"),
    _rule(r"\b(is|are|was|were|be) told\b|\btells? of\b|\btold of\b", "reported, printed, named, diagnosed"),
    _rule(r"\bnobody\b", "no rank, no process"),
    _rule(r"\banew\b", "again"),
    _rule(r"\b(its|the|their) like\b", "the noun"),
    _rule(r"\b(came|comes?|became|becomes?) of\b", "result, outcome"),
    _rule(r"\bsure to be\b", "95 % CI"),
    _rule(r"\bin the place of\b", "instead of"),
    _rule(r"\b(apiece|thereof|whereby|lest|hither|thence)\b", "each, of it, by which, so that not"),
)


class Place(NamedTuple):
    """A phrase in a file, and what to write for it."""

    path: Path
    line: int
    phrase: str
    plain: str

    def __str__(self) -> str:
        """One line, as compilers write it."""
        return f"{self.path}:{self.line}: '{self.phrase}': {self.plain}"


def main(arguments: list[str] | None = None) -> int:
    """Print the places and their rate; return 1 if the rate is above MOST."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help=f"default: {' '.join(PATHS)}")
    parser.add_argument("--list", action="store_true", help="print the places even if the rate is within the bound")
    options = parser.parse_args(arguments)
    places, lines = check(options.paths or [ROOT / path for path in PATHS])
    rate = 1000 * len(places) / max(lines, 1)
    if options.list or rate > MOST:
        print("".join(f"{place}\n" for place in places), end="")
    print(f"prose: {len(places)} phrases in {lines} lines, {rate:.1f} per 1,000; at most {MOST:g}", file=sys.stderr)
    return int(rate > MOST)


def check(paths: list[Path]) -> tuple[list[Place], int]:
    """Places of phrases in the files below `paths`, and the number of lines of prose."""
    places: list[Place] = []
    lines = 0
    for path in _files(paths):
        for first, text in _texts(path):
            lines += sum(bool(line.strip()) for line in text.splitlines())
            places += [Place(_shown(path), first + line, phrase, plain) for line, phrase, plain in found(text)]
    return sorted(places), lines


def found(text: str) -> Iterator[tuple[int, str, str]]:
    """Phrases in `text`: the line, counted from 0, the phrase, and what to write for it."""
    for rule in RULES:
        for match in rule.pattern.finditer(text):
            phrase = match.group().strip(" \t\n.")
            yield text.count("\n", 0, match.start() + match.group().index(phrase)), " ".join(phrase.split()), rule.plain


def _files(paths: list[Path]) -> Iterator[Path]:
    """Python and Markdown files, sorted; a path that is a file stands for itself."""
    for path in paths:
        yield from [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.suffix in {".py", ".md"})


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of a file with their first lines: its paragraphs, or its strings of several words and its comments."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        for paragraph in re.finditer(r"(?:^.*\S.*\n?)+", source, re.MULTILINE):
            yield 1 + source.count("\n", 0, paragraph.start()), paragraph.group()
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    yield from _comments(source)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments with their first lines; those on adjacent lines are one text."""
    start, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if lines and token.start[0] != start + len(lines):
            yield start, "\n".join(lines)
            lines = []
        start = start if lines else token.start[0]
        lines.append(token.string.lstrip("# "))
    if lines:
        yield start, "\n".join(lines)


def _shown(path: Path) -> Path:
    """A path below the checkout relative to it, any other as it is."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
