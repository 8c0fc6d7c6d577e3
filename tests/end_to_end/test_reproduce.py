"""Diagnosis of a failing run as a user does it: bundle, replay, bisect, shrink."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path

import pytest

from tests.end_to_end.in_process import Run
from tests.end_to_end.launches import SOAK, Bench, wait_until

SHORT = ("--limit", "max-recv-1", "--policy", "unchecked", "--max-dispatch-tokens-per-rank", "64")


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a failed run, with its bundle in `bundles`."""
    out = tmp_path_factory.mktemp("failed")
    run = Run(out, "run", "--model", "tiny", "--nproc", "4", *SHORT, "--bundle", out / "bundles")
    assert run.exit_code == 1
    assert "distbench replay" in run.stdout
    return out


def test_replay_of_a_bundle_reproduces_its_verdict(failed: Path, tmp_path: Path) -> None:
    (bundle,) = (failed / "bundles").iterdir()
    done = Run(tmp_path, "replay", bundle)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "from the recording: UNDER_LIMIT, as its report says" in done.stdout
    assert "reproduced here (emulated" in done.stdout


def test_replay_that_does_not_reproduce_names_the_differences(failed: Path, tmp_path: Path) -> None:
    (bundle,) = (failed / "bundles").iterdir()
    done = Run(tmp_path, "replay", bundle, "--limit", "off")
    assert done.exit_code == 1
    assert "not reproduced here" in done.stdout
    assert "case: limit" in done.stdout


def test_replay_of_other_inputs_tells_that_the_run_here_differs(failed: Path, tmp_path: Path) -> None:
    (bundle,) = (failed / "bundles").iterdir()
    copy = shutil.copytree(bundle, tmp_path / "copy")
    for name in ("manifest.json", "report.json"):
        content = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(content | {"inputs_version": 1}))
    done = Run(tmp_path / "out", "replay", copy)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "from the recording: UNDER_LIMIT, as its report says" in done.stdout
    assert "the run here has other inputs of the same seed, and its verdict may differ" in done.stdout
    assert "version of the inputs" in done.stdout


def as_of_a_device(bundle: Path, copy: Path) -> Path:
    """Copy a bundle as a machine with devices, MoRI and the Triton experts would have left it."""
    shutil.copytree(bundle, copy)
    for name in ("manifest.json", "report.json"):
        path = copy / name
        content = json.loads(path.read_text())
        content["case"] |= {"device": "cuda", "transport": "mori", "experts": "triton", "emulate": False}
        path.write_text(json.dumps(content))
    return copy


def test_bundle_of_a_device_replays_on_the_cpu_with_available_parts(failed: Path, tmp_path: Path) -> None:
    (recorded,) = (failed / "bundles").iterdir()
    bundle = as_of_a_device(recorded, tmp_path / "bundle")
    here = ("--device", "cpu", "--transport", "collective", "--experts", "reference")
    command = next(
        line for line in json.loads((bundle / "manifest.json").read_text())["how_to_replay"] if "cpu" in line
    )
    assert " ".join(here) in command
    done = Run(tmp_path / "out", "replay", bundle, *here, "--repeats", "2")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "from the recording: UNDER_LIMIT, as its report says" in done.stdout
    assert "reproduced here (emulated: collective for mori, reference for aiter): UNDER_LIMIT" in done.stdout
    for key, then, now in (("device", "cuda", "cpu"), ("transport", "mori", "collective"), ("repeats", "1", "2")):
        assert re.search(rf"case: {key} +{then} +{now}", done.stdout)
    missing = Run(tmp_path / "out", "replay", bundle)
    assert missing.exit_code == 77
    assert "UNSUPPORTED" in missing.stderr


@pytest.mark.parametrize("command", ["bisect", "shrink"])
def test_bisect_or_shrink_of_a_passing_report_is_refused_before_a_case_runs(command: str, tmp_path: Path) -> None:
    run = ("--model", "tiny", "--nproc", "2", "--tokens", "3", "--max-dispatch-tokens-per-rank", "64")
    assert Run(tmp_path, "run", *run).exit_code == 0
    done = Run(tmp_path / command, command, tmp_path / "report.json")
    assert done.exit_code == 2
    assert done.stderr.startswith("distbench: INVALID: the ")
    assert not (tmp_path / command / "results.jsonl").exists()
    if command == "bisect":
        assert "--seeds N" in done.stderr
        tried = Run(tmp_path / command, command, tmp_path / "report.json", "--seeds", "3")
        assert tried.exit_code == 1
        assert "the case does not fail here: fails on 0 of 3" in tried.stdout
        assert "bisect: as given, with 3 seeds of at most 3" in tried.stderr


def test_bisect_and_shrink_accept_a_failing_report(failed: Path, tmp_path: Path) -> None:
    report = failed / "report.json"
    blamed = Run(tmp_path / "bisect", "bisect", report)
    assert blamed.exit_code == 0, blamed.stdout + blamed.stderr
    assert "truncate is guilty; fails on 5 of 5, 47.8 to 100 %; cured is what passes 6 times in a row" in blamed.stdout
    assert blamed.stdout.splitlines()[-1].endswith("(1 launch)")
    small = Run(tmp_path / "shrink", "shrink", report)
    assert small.exit_code == 0, small.stdout + small.stderr
    assert [line for line in small.stderr.splitlines() if line.endswith((" launch)", " launches)"))][-1].endswith(
        " cases, 1 launch)"
    )
    case = json.loads((tmp_path / "shrink" / "shrunk.json").read_text())
    assert case["ep_size"] <= 2
    assert sum(case["tokens"]) <= 4
    shrunk = ("--case", tmp_path / "shrink" / "shrunk.json", "--nproc", str(case["ep_size"]))
    again = Run(tmp_path, "run", *shrunk)
    assert again.exit_code == 1


@pytest.mark.parametrize(
    "inject",
    [
        "death:stage=experts",
        pytest.param("hang:stage=combine", marks=pytest.mark.skipif(not SOAK, reason="long: set DISTBENCH_SOAK=1")),
    ],
)
def test_case_that_loses_its_ranks_shrinks_to_the_same_stage_and_leaves_no_process(inject: str, tmp_path: Path) -> None:
    case = {"model": "tiny", "ep_size": 4, "inject": inject, "stage_timeouts": "experts=1.5,combine=1.5"}
    path = tmp_path / "case.json"
    path.write_text(json.dumps(case | {"policy": "unchecked", "max_dispatch_tokens_per_rank": 64}))
    start = time.monotonic()
    with Bench(tmp_path / "out", "shrink", path) as bench:
        assert bench.finish() == 0
        assert wait_until(bench.gone, 2)
    assert time.monotonic() - start < 60
    verdict, stage = ("HANG", "combine") if "hang" in inject else ("RANK_FAULT", "experts")
    assert bench.stdout.splitlines()[-1].startswith(f"{verdict}, {stage}, ")
    small = json.loads((tmp_path / "out" / "shrunk.json").read_text())
    assert small["ep_size"] <= 2
    assert sum(small["tokens"]) <= 4
    cases, launches = map(int, re.findall(r"(\d+) cases, (\d+) launches", bench.stderr)[-1])
    assert 1 < launches <= cases


def test_bundle_of_lost_ranks_holds_their_hosts_and_their_routing(tmp_path: Path) -> None:
    case = ("--model=tiny", "--nproc=2", "--max-dispatch-tokens-per-rank=64", "--inject=death")
    run = Run(tmp_path, "run", *case, "--bundle", tmp_path / "bundles")
    assert run.exit_code == 3
    (bundle,) = (tmp_path / "bundles").iterdir()
    parts = {"rank-00000.safetensors", "rank-00001.safetensors"}
    assert {path.name for path in bundle.iterdir()} == {"manifest.json", "report.json", *parts}
    environment = json.loads((bundle / "report.json").read_text())["environment"]
    assert (environment["hosts"], environment["devices"]) == ([socket.gethostname()], ["cpu"])
    replayed = Run(tmp_path / "replay", "replay", bundle, "--offline")
    assert replayed.exit_code == 1
    assert f"on {socket.gethostname()}\n" in replayed.stdout
    assert re.search(r"inputs +32 +0", replayed.stdout)
    assert "no rows were recorded" in replayed.stdout
