"""Usable cores of a process, as the kernel limits them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distbench.utils.process import usable_cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 3), ("800000 100000", 3), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("", 3)],
)
def test_usable_cores_are_the_affinity_limited_by_the_cgroup_quota(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 6})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert usable_cores(tmp_path / "cpu.max") == cores
    assert usable_cores(tmp_path / "none") == 3


def test_usable_cores_without_an_affinity_call_are_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores(tmp_path / "none") == 64
