"""Results of a suite or a run, read one at a time, for exports and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from distbench.errors import InvalidCase, suite_code, worst_exit_code
from distbench.report.document import DEVICE_CLOCK
from distbench.report.journal import RESULTS, Summary
from distbench.report.schema import SCHEMA, CaseView
from distbench.utils.text import one_line

SUMMARY = "summary.json"
_SIGNALS = 128
_MEDIAN_ERROR = "median_error"  # figures of timed iterations alone have it


class ResultRank(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of a result: its host and device, and the rows that it received."""

    rank: int
    host: str
    device: str
    total_recv: int
    digests: dict[str, str] = {}


class ResultLost(msgspec.Struct, frozen=True):
    """Rows at and past the limit."""

    rows: int


class StageTime(msgspec.Struct, frozen=True):
    """Time of one stage in one arm: the slowest rank's median in microseconds, and the raw samples where kept.

    `timed` for timed iterations (`--iterations`); else the passes whose bits are checked, once for each repeat.
    """

    arm: str
    stage: str
    median_us: float
    samples_us: tuple[float, ...]
    timed: bool = False


class Result(CaseView, frozen=True, kw_only=True):
    """The part of a report that exports and comparisons need (docs/report-format.md)."""

    ranks: list[ResultRank]
    lost: ResultLost

    @property
    def timed_on_device(self) -> bool:
        """Whether its times were taken by a device's clock."""
        return self.method.get("clock") == DEVICE_CLOCK

    @property
    def timed_arms(self) -> frozenset[str]:
        """Arms with timed iterations, whose figures have a `median_error`; empty without `--iterations`."""
        return frozenset(
            arm
            for arm, stages in self.timing.items()
            if isinstance(stages, dict)
            and any(isinstance(figures, dict) and _MEDIAN_ERROR in figures for figures in stages.values())
        )

    @property
    def hash(self) -> str:
        """The hash of the case."""
        return str(self.case["hash"])

    @property
    def wall_s(self) -> float:
        """Seconds that the case took on rank 0, without start-up."""
        return float(self.timing["wall_s"])

    @property
    def hosts(self) -> list[str]:
        """The hosts of the ranks, each once."""
        return sorted({rank.host for rank in self.ranks})

    def stage_times(self) -> Iterator[StageTime]:
        """Yield the times of all arms' stages.

        Raises:
            ValueError: a time that is not a number of microseconds.

        """
        for arm, stages in self.timing.items():
            if isinstance(stages, dict):
                for stage, figures in stages.items():
                    if isinstance(figures, dict) and "median_us" in figures:
                        yield _stage_time(arm, stage, figures)


def _stage_time(arm: str, stage: str, figures: dict[str, Any]) -> StageTime:
    try:
        return StageTime(
            arm,
            stage,
            msgspec.convert(figures["median_us"], float),
            msgspec.convert(figures.get("samples_us", ()), tuple[float, ...]),
            timed=_MEDIAN_ERROR in figures,
        )
    except msgspec.ValidationError as error:
        message = f"timing of {arm}/{stage}: {one_line(error)}"
        raise ValueError(message) from error


class Results:
    """The results in a folder, a journal or a report.json, read from disk on each iteration.

    Of two results for one case the first counts, as in a suite. An incomplete last line, which is being written or was
    cut off by a kill, is no result. A finished suite without any has an empty set of them.
    """

    def __init__(self, path: str | Path, keep: Callable[[str], bool] | None = None) -> None:
        """Open `path`; `keep` selects results by a case's hash."""
        self.path = Path(path)
        self._keep = keep
        self._file = self.path / RESULTS if self.path.is_dir() else self.path

    @property
    def summary(self) -> Summary | None:
        """The suite's summary, where there is one."""
        return _read_summary(self.path / SUMMARY) if self.path.is_dir() else None

    @property
    def missing(self) -> int:
        """Number of the suite's cases without a result; 0 where only a file is known."""
        summary = self.summary
        return max(summary.cases - summary.finished, 0) if summary else 0

    @property
    def exit_code(self) -> int:
        """The exit code of all results together, where missing ones and events count as lost ranks.

        The code of a signal, or of a lack of time, is kept if it ended the suite before all cases had a result.
        """
        codes = {suite_code(result.exit_code, as_expected=result.as_expected) for result in self}
        summary = self.summary
        if summary is not None and self.missing and summary.exit_code > _SIGNALS:
            return summary.exit_code
        return worst_exit_code(codes | (set() if summary is None else summary.incomplete_codes))

    def __iter__(self) -> Iterator[Result]:
        return (result for _, result in self.lines())

    def lines(self) -> Iterator[tuple[bytes, Result]]:
        """Yield each result with the bytes of its document.

        Raises:
            InvalidCase: the file cannot be read, or part of it is no report.

        """
        seen: set[str] = set()
        for raw, where in self._documents():
            result = _decode(raw, where)
            if result.hash not in seen and (self._keep is None or self._keep(result.hash)):
                seen.add(result.hash)
                yield raw, result

    def _documents(self) -> Iterator[tuple[bytes, str]]:
        try:
            with self._file.open("rb") as file:
                if self._file.suffix == ".json":
                    yield file.read(), str(self._file)
                    return
                for number, raw in enumerate(file, 1):
                    if raw.endswith(b"\n"):
                        yield raw[:-1], f"{self._file}, line {number}"
        except FileNotFoundError as error:
            if self.summary is None:
                raise self._unreadable(error) from error
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> InvalidCase:
        return InvalidCase(
            f"results {self.path}: {error.strerror}; give the --out folder of a suite, a .jsonl or a .json"
        )


def _decode(raw: bytes, where: str) -> Result:
    try:
        result = msgspec.json.decode(raw, type=Result)
        msgspec.convert(result.case["hash"], str)
        msgspec.convert(result.timing["wall_s"], float)
    except (ValueError, KeyError, RecursionError) as error:
        message = f"{where}: {one_line(error)}; give results of schema {SCHEMA}"
        raise InvalidCase(message) from error
    if result.schema != SCHEMA:
        message = f"{where}: schema {result.schema!r:.40}, known is {SCHEMA}"
        raise InvalidCase(message)
    return result


def _read_summary(path: Path) -> Summary | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path}: {one_line(error)}; run the suite again, or name results.jsonl itself"
        raise InvalidCase(message) from error
