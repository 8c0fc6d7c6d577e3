"""Tokens of each rank, step by step: from a log, a table, or a distribution. Keeps two numbers a step."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.tools.advise.chance import Batch
from distbench.utils.text import counted, one_line, shown

Phase = Literal["decode", "prefill"]
FORMS = "uniform:LOW-HIGH, poisson:MEAN, or a .csv, .json, .jsonl or .log file"

_UNIFORM = re.compile(r"uniform:(\d{1,8})-(\d{1,8})", re.ASCII)
_POISSON = re.compile(r"poisson:(\d{1,8}(?:\.\d{1,6})?)", re.ASCII)
_LINE = {
    "decode": re.compile(r"\[[^\]]*\] Decode batch(?: \[(\d{1,15})\])?[,.] .*?#running-req: (\d{1,9})", re.ASCII),
    "prefill": re.compile(r"\[[^\]]*\] Prefill batch(?: \[(\d{1,15})\])?[,.] .*?#new-token: (\d{1,9})", re.ASCII),
}
_RANK = re.compile(r" (DP|TP)(\d{1,5})(?=[ \]])", re.ASCII)
_COLUMNS = ("step", "rank", "tokens")
_MOST_STEPS, _MOST_ENTRIES, _MOST_JSON = 1 << 22, 1 << 27, 256 << 20
_MOST_LINE = 1 << 16
_MOST_SIZES = 256
_DRAWN_AT_ONCE = 1 << 20


class Limits(NamedTuple):
    """Ranks of the batches, tokens that each may have, and the option that says so."""

    ep_size: int
    most: tuple[int, ...]
    name: str


class Steps(NamedTuple):
    """Sizes of the steps: names int64 [S], tokens of all ranks and of the fullest sender int64 [S], and a text."""

    names: NDArray[np.int64]
    totals: NDArray[np.int64]
    mosts: NDArray[np.int64]
    text: str

    def batches(self) -> tuple[list[Batch], NDArray[np.int64]]:
        """Distinct sizes with their shares, and the size of each step, int64 [S].

        At most 256 sizes: of more, neighbours are rounded up to the larger one, so that chances are upper bounds.
        """
        levels = np.unique(self.totals)
        if len(levels) > _MOST_SIZES:
            picked = np.linspace(0, len(levels) - 1, _MOST_SIZES).round().astype(np.int64)
            levels = levels[picked]
        place = np.searchsorted(levels, self.totals)
        mosts = np.zeros(len(levels), dtype=np.int64)
        np.maximum.at(mosts, place, self.mosts)
        shares = np.bincount(place, minlength=len(levels)) / len(self.totals)
        columns = (levels.tolist(), mosts.tolist(), shares.tolist())
        return [Batch(*one) for one in zip(*columns, strict=True)], place


def full_steps(tokens: tuple[int, ...], count: int) -> Steps:
    """Steps in which every rank has all the tokens that it may have."""
    names = np.arange(count, dtype=np.int64)
    sizes = (np.full(count, sum(tokens), dtype=np.int64), np.full(count, max(tokens), dtype=np.int64))
    return Steps(names, *sizes, f"{counted(count, 'step')} with all tokens")


def read_steps(text: str, limits: Limits, count: int, seed: int, phase: Phase) -> Steps:
    """Steps of a file, or `count` steps of a distribution.

    Raises:
        InvalidCase: it is neither, or a rank has more tokens than it may, or is none of the ranks.

    """
    uniform, poisson = _UNIFORM.fullmatch(text), _POISSON.fullmatch(text)
    if uniform and int(uniform[1]) <= int(uniform[2]):
        low, high = int(uniform[1]), int(uniform[2])
        if high > min(limits.most):
            _refuse(text, f"{counted(high, 'token')}, and a rank has at most {min(limits.most)} ({limits.name})")
        return _drawn(limits, count, lambda rng, size: rng.integers(low, high + 1, size), seed, text)
    if poisson:
        mean, most = float(poisson[1]), np.array(limits.most)
        return _drawn(limits, count, lambda rng, size: np.minimum(rng.poisson(mean, size), most), seed, text)
    path = Path(text)
    readers = {".csv": _csv_entries, ".json": _json_entries, ".jsonl": _jsonl_entries, ".log": _log_entries}
    if path.suffix not in readers:
        _refuse(text, f"allowed are {FORMS}")
    return _read(path, readers[path.suffix], limits, phase)


def _drawn(limits: Limits, count: int, draw: Any, seed: int, text: str) -> Steps:
    rng = np.random.default_rng(seed)
    totals, mosts = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    rows = max(_DRAWN_AT_ONCE // limits.ep_size, 1)
    with Meter("batches", count) as meter:
        for start in range(0, count, rows):
            tokens = draw(rng, (min(rows, count - start), limits.ep_size))
            totals[start : start + rows], mosts[start : start + rows] = tokens.sum(axis=1), tokens.max(axis=1)
            meter.done = start
    return Steps(
        np.arange(count, dtype=np.int64), totals, mosts, f"{counted(count, 'step')} of {text}, each rank on its own"
    )


class _Tally:
    """Sums the tokens of each step, and refuses what no step can have."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits
        self._totals: dict[int, int] = {}
        self._mosts: dict[int, int] = {}
        self._ranks: dict[int, int] = {}
        self._entries = 0

    def add(self, step: Any, rank: Any, tokens: Any) -> None:
        numbers = {"step": step, "rank": rank, "tokens": tokens}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 53:
                _refuse(str(self._path), f"{name} = {shown(number)}; allowed are whole numbers from 0 up")
        if rank >= self._limits.ep_size:
            _refuse(
                str(self._path),
                f"step {step} has rank {rank} of {counted(self._limits.ep_size, 'rank')}; give --ep-size",
            )
        if tokens > self._limits.most[rank]:
            most = self._limits.most[rank]
            _refuse(
                str(self._path),
                f"step {step}: rank {rank} has {tokens} tokens, above {self._limits.name} = {most}; raise it",
            )
        bit = 1 << rank
        before = self._ranks.get(step, 0)
        if before & bit:
            _refuse(str(self._path), f"step {step} has rank {rank} twice")
        self._entries += 1
        if (not before and len(self._ranks) >= _MOST_STEPS) or self._entries > _MOST_ENTRIES:
            _refuse(str(self._path), f"more than {_MOST_STEPS} steps or {_MOST_ENTRIES} entries; give a part of it")
        self._ranks[step] = before | bit
        self._totals[step] = self._totals.get(step, 0) + tokens
        self._mosts[step] = max(self._mosts.get(step, 0), tokens)

    def steps(self, *, fill: bool) -> Steps:
        """The steps in order; with `fill`, ranks without an entry have as many tokens as the step's fullest."""
        if not self._totals:
            _refuse(str(self._path), "no step in it")
        names = sorted(self._totals)
        totals = np.array([self._totals[name] for name in names], dtype=np.int64)
        mosts = np.array([self._mosts[name] for name in names], dtype=np.int64)
        absent = np.array([self._limits.ep_size - self._ranks[name].bit_count() for name in names], dtype=np.int64)
        filled = int((absent > 0).sum()) if fill else 0
        told = f", in {filled} of them ranks without a line counted as the fullest one" if filled else ""
        if fill:
            totals += absent * mosts
        return Steps(
            np.array(names, dtype=np.int64), totals, mosts, f"{counted(len(names), 'step')} of {self._path}{told}"
        )


def _read(path: Path, entries: Any, limits: Limits, phase: Phase) -> Steps:
    tally = _Tally(path, limits)
    try:
        with os.fdopen(open_regular(str(path)), "rb") as stream, Meter(f"read {path.name}"):
            for step, rank, tokens in entries(stream, phase):
                tally.add(step, rank, tokens)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        _refuse(str(path), f"cannot be read ({reason})", error)
    return tally.steps(fill=path.suffix == ".log")


def _lines(stream: IO[bytes]) -> Iterator[str]:
    while line := stream.readline(_MOST_LINE):
        if len(line) == _MOST_LINE:
            message = f"a line of more than {_MOST_LINE} bytes"
            raise ValueError(message)
        yield line.decode("utf-8", "replace")


def _csv_entries(stream: IO[bytes], _: Phase) -> Iterator[tuple[Any, ...]]:
    rows = csv.reader(_lines(stream))
    head = [name.strip().lower().removeprefix("\ufeff") for name in next(rows, [])]
    missing = [name for name in _COLUMNS if name not in head]
    if missing:
        message = f"no column {', '.join(missing)}; the first line names step, rank and tokens"
        raise ValueError(message)
    places = [head.index(name) for name in _COLUMNS]
    for row in rows:
        if row:
            yield tuple(int(row[place]) if place < len(row) else -1 for place in places)


def _json_entries(stream: IO[bytes], _: Phase) -> Iterator[tuple[Any, ...]]:
    content = stream.read(_MOST_JSON + 1)
    if len(content) > _MOST_JSON:
        message = f"more than {_MOST_JSON >> 20} MiB; give .jsonl or .csv"
        raise ValueError(message)
    table = msgspec.json.decode(content)
    if not isinstance(table, list):
        message = "not a list; give [[tokens of each rank], …], or [{step, rank, tokens}, …]"
        raise ValueError(message)  # noqa: TRY004 - content of a file, not an argument
    for step, one in enumerate(table):
        if isinstance(one, list):
            yield from ((step, rank, tokens) for rank, tokens in enumerate(one))
        else:
            yield _entry(one)


def _jsonl_entries(stream: IO[bytes], _: Phase) -> Iterator[tuple[Any, ...]]:
    for line in _lines(stream):
        if line.strip():
            yield _entry(msgspec.json.decode(line))


def _entry(one: Any) -> tuple[Any, ...]:
    if not isinstance(one, dict) or any(name not in one for name in _COLUMNS):
        message = f"{shown(one)} has no step, rank and tokens"
        raise ValueError(message)
    return tuple(one[name] for name in _COLUMNS)


def _log_entries(stream: IO[bytes], phase: Phase) -> Iterator[tuple[Any, ...]]:
    """Lines of SGLang's scheduler: the rank is DP's, else TP's; the step the number that the line has, else its own."""
    counts: dict[int, int] = {}
    for line in _lines(stream):
        found = _LINE[phase].search(line)
        if not found:
            continue
        ranks = dict(_RANK.findall(found[0].partition("]")[0] + "]"))
        rank = int(ranks.get("DP") or ranks.get("TP") or 0)
        step = int(found[1]) if found[1] else counts.get(rank, 0)
        counts[rank] = counts.get(rank, 0) + 1
        yield step, rank, int(found[2])


def _refuse(text: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    message = f"--batches {text!r:.200}: {reason}"
    raise InvalidCase(message) from cause
