"""Transport symmetric on devices, which ranks share where there are fewer of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.launches import Bench

pytestmark = pytest.mark.gpu
PARTS = ("--transport", "symmetric", "--experts", "triton", "--device", "cuda", "--share-devices", "--model", "tiny")
TOKENS = {2: "9,5", 4: "9,0,12,7"}


def ran(tmp_path: Path, ranks: int, *flags: str, code: int = 0) -> dict[str, Any]:
    given = ("--nproc", str(ranks), "--tokens", TOKENS[ranks], "--max-dispatch-tokens-per-rank", "64", *flags)
    with Bench(tmp_path / "out", "run", *PARTS, *given) as bench:
        assert bench.finish() == code, bench.stderr
        report: dict[str, Any] = json.loads((bench.out / "report.json").read_text())
    return report


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_ranks_that_map_each_others_memory_pass_in_both_numerics(tmp_path: Path, ranks: int, dtype: str) -> None:
    report = ran(tmp_path, ranks, "--dispatch-dtype", dtype, "--limit", "max-recv", "--repeats", "5", "--jitter", "2")
    assert "ranks that share devices" in report["stand_ins"]
    assert report["transport"]["kernel"] == "symmetric_memory"


def test_whole_layer_is_replayed_from_one_graph_with_other_tokens(tmp_path: Path) -> None:
    report = ran(tmp_path, 4, "--graph", "layer", "--limit", "sum32")
    for rank in report["ranks"]:
        assert [(one["arm"], len(one["replays"])) for one in rank["layer_graphs"]] == [
            ("padded", 10),
            ("truncated", 10),
        ]
        assert not any(wrong for one in rank["layer_graphs"] for _, wrong, _ in one["replays"])


@pytest.mark.parametrize("fault", ["stale-slot", "count-not-zeroed", "release-before-data"])
def test_fault_of_the_kernels_is_attributed_to_its_rank_in_dispatch(tmp_path: Path, fault: str) -> None:
    flags = ("--numerics", "exact", "--policy", "unchecked", "--limit", "max-recv")
    report = ran(tmp_path, 4, *flags, "--inject", f"{fault}:rank=2,arm=truncated", code=1)
    assert report["verdict"] == "CORRUPT"
    assert (report["diagnosis"][0]["stage"], report["diagnosis"][0]["ranks"]) == ("dispatch", [2])


@pytest.mark.parametrize("stage", ["dispatch", "combine"])
def test_rank_that_sends_no_signal_is_named_with_the_stage(tmp_path: Path, stage: str) -> None:
    flags = ("--numerics", "exact", "--policy", "unchecked", "--limit", "max-recv")
    limits = ("--stage-timeouts", "dispatch=3,combine=3")
    report = ran(tmp_path, 4, *flags, *limits, "--inject", f"signal-lost:rank=2,stage={stage}", code=3)
    assert report["verdict"] == "HANG"
    assert {(reason["rank"], reason["stage"]) for reason in report["reasons"]} == {(2, stage)}
