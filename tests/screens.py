"""Screens of commands at two widths and in a pipe, printed from stored results: no rank starts.

`.venv/bin/python -m tests.screens` writes them to tests/golden/ again, after a change that is meant to.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import msgspec
import numpy as np

from distbench.cli import cluster, selftest
from distbench.cli.main import main
from distbench.cli.sweep import proof_notes
from distbench.report.console import print_report, print_summary, print_sweep
from distbench.report.files import read_report
from distbench.report.journal import Summary
from distbench.report.sweep import COLUMNS, SweepRow
from distbench.tools.cluster.validation import read_validation
from distbench.tools.selftest.outcomes import Outcomes
from tests.results import result, timing, write_results

ROOT = Path(__file__).parent
STORED = ROOT / "data" / "screens"
GOLDEN = ROOT / "golden"
WIDTHS = {"80": 80, "120": 120, "pipe": None}
KERNELS = ("kernels", "--limits=64,4096", "--aiter-version=0.1.16", "--cu-count=304")


class Screen(io.StringIO):
    """Standard output as a terminal, or as a pipe."""

    def __init__(self, *, live: bool) -> None:
        super().__init__()
        self._live = live

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def isatty(self) -> bool:
        return self._live


def _run() -> None:
    print_report(read_report(str(STORED / "run.json")))


def _timed() -> None:
    print_report(read_report(str(STORED / "timed.json")))


def _sweep() -> None:
    rows = msgspec.json.decode((STORED / "sweep.json").read_bytes(), type=list[SweepRow])
    print_sweep([row.cells() for row in rows], COLUMNS, proof_notes(rows))


def _suite() -> None:
    print_summary(msgspec.json.decode((STORED / "suite.json").read_bytes(), type=Summary), "results")


def _compare() -> None:
    """A suite with a regression, a slower stage, and another version of torch."""
    random = np.random.default_rng(1)
    samples = [100.0 + float(one) for one in random.random(30)]
    before = timing(1.0, samples) | {"wall_s": 0.25}
    after = before | {"truncated": before["truncated"] | {"experts": timing(1.5, samples)["truncated"]["experts"]}}
    environment = {"hosts": ["node0"], "devices": ["cpu"], "commits": {}, "variables": {}}
    old = [result("model=tiny/limit=sum32", timing=before, environment=environment | {"versions": {"torch": "2.9.0"}})]
    new = [result("model=tiny/limit=sum32", timing=after, environment=environment | {"versions": {"torch": "2.13.0"}})]
    with tempfile.TemporaryDirectory() as folder:
        folders = [
            str(write_results(Path(folder) / name, [*made, result("model=tiny/limit=max-recv", verdict)]))
            for name, made, verdict in (("old", old, "PASS"), ("new", new, "CORRUPT"))
        ]
        main(["compare", *folders])


def _selftest() -> None:
    selftest.print_outcomes(msgspec.json.decode((STORED / "selftest.json").read_bytes(), type=Outcomes))


def _kernels() -> None:
    main(KERNELS)


def _cluster() -> None:
    cluster.print_validation(Path("distbench-out/cluster"), read_validation(STORED / "cluster.json"))


SCREENS: dict[str, Callable[[], None]] = {
    "run": _run,
    "run-timed": _timed,
    "sweep": _sweep,
    "suite": _suite,
    "compare": _compare,
    "selftest": _selftest,
    "kernels": _kernels,
    "cluster": _cluster,
}


def drawn(name: str, width: int | None) -> str:
    """What a command prints: on a terminal of `width` columns, or in a pipe."""
    screen = Screen(live=width is not None)
    with _place({"COLUMNS": str(width or 0), "LINES": "50", "NO_COLOR": "1", "TERM": "xterm"}), redirect_stdout(screen):
        SCREENS[name]()
    return screen.getvalue()


@contextmanager
def _place(variables: dict[str, str]) -> Iterator[None]:
    """The folder of the repository, and an environment without variables of production."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AITER_", "SGLANG_", "MORI_"))}
    before = Path.cwd()
    with patch.dict(os.environ, kept | variables, clear=True):
        os.chdir(ROOT.parent)
        try:
            yield
        finally:
            os.chdir(before)


def golden(name: str, width: str) -> Path:
    """File of a screen."""
    return GOLDEN / f"{name}-{width}.txt"


if __name__ == "__main__":
    for screen in SCREENS:
        for label, columns in WIDTHS.items():
            golden(screen, label).write_text(drawn(screen, columns), encoding="utf-8")
