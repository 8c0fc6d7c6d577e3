"""Cases that tests ask for, without a launch: what this machine lacks, and keys of a suite's cases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from distbench.testing.cases import Request, Runs, cases_of_suite


def test_case_that_needs_more_devices_than_there_are_is_not_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distbench.launcher.preflight.count_devices", lambda: 1)
    request = Request("", {"model": "tiny", "device": "cuda"}, 2, "PASS")
    ended = Runs({"test": request}, tmp_path).outcome(SimpleNamespace(nodeid="test"))  # type: ignore[arg-type]
    assert not ended.supported
    assert ended.refused.startswith("device cuda: 2 ranks on this node, torch sees 1 device;")


def test_keys_that_a_suite_gives_stay_where_they_are_defaults() -> None:
    keys = cases_of_suite(Path(), {"suite": "conformance", "ranks": 2, "seed": 0})[0].keys
    assert (keys["prealloc_max_recv_tokens"], keys["recv_bound"], keys["seed"]) == (0, False, 0)
    assert "transport" not in keys
