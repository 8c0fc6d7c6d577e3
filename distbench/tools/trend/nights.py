"""The nights: folders of results, found and put in the order of their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import msgspec

from distbench.errors import InvalidCase
from distbench.report.document import ENDED
from distbench.report.journal import RESULTS
from distbench.report.results import SUMMARY, Results

_SUFFIXES = (".jsonl", ".json")


class Night(NamedTuple):
    """One set of results: its name, and when its last case ended, else when its file was written."""

    name: str
    results: Results
    ended: str


class Found(NamedTuple):
    """Nights in the order of their time, folders that hold no results, and the number of older nights left out."""

    nights: list[Night]
    without: list[Path]
    left_out: int


class _Ended(msgspec.Struct, frozen=True):
    ended: str = ""


def find_nights(paths: Sequence[str], last: int) -> Found:
    """The newest `last` nights of these files, folders of results, and folders that hold such folders.

    Raises:
        InvalidCase: a path without results.

    """
    places: dict[Path, Path] = {}
    without: list[Path] = []
    for path in map(Path, paths):
        found = [path] if _holds_results(path) else _inside(path)
        without += [one for one in found if not _holds_results(one)]
        places |= {one.resolve(): one for one in found if _holds_results(one)}
    opened = [(place, _opened(place)) for place in places.values()]
    timed = sorted(((_ended(results), place, results) for place, results in opened), key=lambda one: one[:2])
    names = Counter(_name(place) for _, place, _ in timed)
    nights = [
        Night(_name(place) if names[_name(place)] == 1 else str(place), results, ended)
        for ended, place, results in timed
    ]
    return Found(nights[-last:], without, max(len(nights) - last, 0))


def _holds_results(path: Path) -> bool:
    if path.is_dir():
        return (path / RESULTS).is_file() or (path / SUMMARY).is_file()
    return path.suffix in _SUFFIXES and path.is_file()


def _inside(folder: Path) -> list[Path]:
    """Folders in `folder`, one of which has results.

    Raises:
        InvalidCase: none has, or it is no folder.

    """
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        message = f"trend {folder}: {error.strerror}; give the --out folders of suites, or a folder that holds them"
        raise InvalidCase(message) from error
    if not any(map(_holds_results, inside)):
        message = (
            f"trend {folder}: no {RESULTS} in it, nor in any of its {len(inside)} folders; give the --out folders of "
            "suites, or a folder that holds them"
        )
        raise InvalidCase(message)
    return inside


def _opened(place: Path) -> Results:
    """Results that the last command there was about, as `distbench report` counts them."""
    results = Results(place)
    summary = results.summary
    if summary is None or not summary.selected:
        return results
    return Results(place, frozenset(summary.selected).__contains__)


def _name(place: Path) -> str:
    return place.resolve().name if place.is_dir() else place.resolve().parent.name


def _ended(results: Results) -> str:
    """When the last result was written, in UTC as in reports; for older reports the time of the file."""
    path = results.path / RESULTS if results.path.is_dir() else results.path
    try:
        ended = msgspec.json.decode(_last_document(path), type=_Ended).ended
        datetime.strptime(ended, ENDED)  # noqa: DTZ007 - whether it is a time
    except (OSError, ValueError, RecursionError):  # a file that cannot be read is refused where it is read whole
        ended = ""
    if ended:
        return ended
    written = path if path.exists() else results.path / SUMMARY
    return datetime.fromtimestamp(written.stat().st_mtime, timezone.utc).strftime(ENDED)


def _last_document(path: Path) -> bytes:
    """The last whole line of a journal, or the whole of a report."""
    if path.suffix == ".json":
        return path.read_bytes()
    last = b""
    with path.open("rb") as lines:
        for line in lines:
            last = line if line.endswith(b"\n") else last
    return last
