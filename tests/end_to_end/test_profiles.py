"""Profiles as users name them: all of them in one suite over the stand-ins, and what a report says of one."""

from __future__ import annotations

import json
from pathlib import Path

from distbench.case.identity import case_hash
from distbench.case.profiles import PROFILES
from distbench.case.resolve import resolve_case
from distbench.report.input_file import load_layer
from tests.end_to_end.in_process import Run
from tests.slim_wheel import atom_folder, vllm_wheel

SMALL = ("--nproc", "4", "--model", "tiny", "--intermediate-size", "256", "--max-dispatch-tokens-per-rank", "64")


def test_every_profile_passes_on_four_ranks_in_bf16_and_fp8_with_both_kinds_of_inputs(tmp_path: Path) -> None:
    suite = tmp_path / "profiles.toml"
    axes = f'profile = {json.dumps(list(PROFILES))}\ndispatch_dtype = ["bf16", "fp8"]'
    suite.write_text(f'[axes]\n{axes}\n[[expect]]\nverdict = "PASS"\n')
    texts = ("--caller-wheel", vllm_wheel(tmp_path), "--caller-folder", atom_folder(tmp_path))
    flags = (*SMALL, "--device", "cpu", "--emulate", *texts)
    run = Run(tmp_path / "out", "suite", str(suite), *flags, SGLANG_MORI_RECV_BOUND="1")
    assert run.exit_code == 0, run.stdout + run.stderr
    assert "12 of 12 cases (12 PASS)" in run.stdout
    reports = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_bytes().splitlines()]
    assert {one["case"]["numerics"] for one in reports} == {"both"}
    limits = {one["case"]["profile"]: one["limit"]["effective"] for one in reports}
    assert limits["vllm"] is None
    assert limits["sglang-epv1-decode"] == limits["atom-native"] == 64
    assert limits["sglang-epv1-prefill"] == 128  # of 64 + 33 + 0 + 7 tokens
    rows = {one["case"]["profile"]: set(one["caller"]["rows"].values()) for one in reports if "caller" in one}
    assert rows["vllm"] == {256}
    assert rows["atom-native"] == {64}
    assert max(rows["atom-vllm-plugin"]) == limits["atom-vllm-plugin"]
    assert rows.keys() == {"vllm", "atom-native", "atom-vllm-plugin"}
    assert "distbench: profile sglang-epv1-decode: its own code does not run: no package sglang here" in run.stderr


def test_report_says_what_the_profile_set_and_what_others_did(tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--emulate", "--profile", "atom-native", "--mori-geometry", "sglang")
    run = Run(tmp_path / "out", "run", *SMALL, *flags, "--tokens", "3", ATOM_MORI_COMBINE_QUANT="fp8_blockwise")
    assert run.exit_code == 0, run.stdout + run.stderr
    text = " ".join(run.stdout.split())
    assert "profile atom-native, defaults: limit sum, " in text
    assert "not its own: combine_quant (env:ATOM_MORI_COMBINE_QUANT), mori_geometry (flag)" in text
    assert "warning: profile atom-native: its own code does not run: no folder has its text" in text
    path = tmp_path / "out" / "report.json"
    report = json.loads(path.read_bytes())
    assert report["case"]["profile"] == "atom-native"
    assert report["sources"]["limit"] == "profile:atom-native"
    again = resolve_case([load_layer(str(path))], 4).case
    assert (case_hash(again), again.mori_geometry) == (report["case"]["hash"], "sglang")
