"""Cases of fewer ranks than their launch, in every order: in a suite, on ranks that stay up, and on devices."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest

from distbench.errors import Verdict
from distbench.tools.lab import Lab
from distbench.utils.devices import count_devices
from distbench.utils.signals import collect_signals
from tests.cases import tiny_case
from tests.end_to_end.in_process import Run
from tests.end_to_end.launches import TINY, Bench

RANKS = 3


def suite_of(path: Path, sizes: tuple[int, ...], **defaults: object) -> Path:
    """Write a suite with one case for each number of ranks, in that order."""
    path.write_text(json.dumps({"defaults": TINY | {"timeout": 5} | defaults, "axes": {"ep_size": list(sizes)}}))
    return path


@pytest.mark.parametrize("sizes", [(1, 2, 3), (1, 3, 2), (3, 1, 2)])
def test_suite_with_subgroups_passes_in_any_order(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    suite = suite_of(tmp_path / "suite.json", sizes)
    run = Run(tmp_path / "out", "suite", suite, f"--nproc={RANKS}")
    assert run.exit_code == 0
    assert run.verdicts == {f"ep_size={size}": "PASS" for size in sizes}


def test_trials_with_subgroups_pass_in_any_order_on_ranks_that_stay_up(tmp_path: Path) -> None:
    """bisect, shrink and replay run their variants on ranks that stay up."""
    with collect_signals(), Lab(tmp_path) as lab:
        lab.run([tiny_case(RANKS)])
        for seed, order in enumerate(permutations(range(1, RANKS + 1)), start=1):
            reports = lab.run([tiny_case(size, seed=seed, timeout=5.0) for size in order])
            assert [report.verdict for report in reports] == [Verdict.PASS] * RANKS
        assert lab.launches == 1


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 2, 1)])
def test_suite_with_subgroups_passes_in_any_order_on_devices(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    if count_devices() < max(sizes):
        pytest.skip(f"needs {max(sizes)} devices")
    suite = suite_of(tmp_path / "suite.json", sizes, device="cuda", experts="triton", timeout=30)
    content = json.loads(suite.read_text())
    content["include"] = [{"ep_size": size, "seed": 1 + place} for place, size in enumerate(sizes)]
    suite.write_text(json.dumps(content))
    with Bench(tmp_path / "out", "suite", suite, f"--nproc={max(sizes)}") as bench:
        assert bench.finish(110) == 0
        assert set(bench.verdicts.values()) == {"PASS"}
