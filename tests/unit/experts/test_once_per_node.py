"""One process per node builds while the others wait, with real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from distbench.experts.once_per_node import first_on_node

RANKS = 6
_CONTEXT = multiprocessing.get_context("fork")


def _build(folder: Path, seconds: float) -> None:
    (folder / f"began-{os.getpid()}").touch()
    time.sleep(seconds)
    (folder / "artefact").touch()


def _rank(folder: Path, *, seconds: float) -> None:
    first_on_node(folder, "kernel", lambda: _build(folder, seconds))
    assert (folder / "artefact").exists()


def _die(folder: Path) -> None:
    first_on_node(folder, "kernel", lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_one_process_per_node_builds_and_the_others_wait(tmp_path: Path) -> None:
    ranks = [_CONTEXT.Process(target=_rank, args=(tmp_path,), kwargs={"seconds": 0.3}) for _ in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * RANKS
    assert len(list(tmp_path.glob("began-*"))) == 1


def test_another_process_builds_if_the_builder_dies(tmp_path: Path) -> None:
    victim = _CONTEXT.Process(target=_die, args=(tmp_path,))
    victim.start()
    victim.join(30)
    assert victim.exitcode == -signal.SIGKILL
    assert first_on_node(tmp_path, "kernel", lambda: _build(tmp_path, 0))


def test_failed_build_is_not_recorded_as_done(tmp_path: Path) -> None:
    def fail() -> None:
        message = "no compiler"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError):
        first_on_node(tmp_path, "kernel", fail)
    assert first_on_node(tmp_path, "kernel", lambda: None)
    assert not first_on_node(tmp_path, "kernel", fail)
    assert first_on_node(tmp_path, "another", lambda: None)
