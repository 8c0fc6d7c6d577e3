"""aiter's adapter over its stand-in, as users start it: the verdict of every public bug of aiter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.in_process import Run

TINY = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "tokens": 3, "experts": "aiter", "emulate": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("PASS", {}),
    "bf16, EP of two": ("PASS", {"ep_size": 2}),
    "bf16, uneven": ("PASS", {"tokens": [5, 0, 2, 1], "routing": "hot-rank:1"}),
    "bf16, gaussian, atomic sums": ("NONDETERMINISTIC", {"numerics": "gaussian", "limit": 256, "routing": "local"}),
    "fp8": ("PASS", {"dispatch_dtype": "fp8", "cu_count": 256}),
    "fp8, release of the wheel": (
        "PASS",
        {"dispatch_dtype": "fp8", "cu_count": 256, "aiter_version": "0.1.7.post2.dev18", "limit": "max-recv"},
    ),
    "fp8 of gfx942": ("PASS", {"dispatch_dtype": "fp8", "cu_count": 304}),
    "fp8 of gfx942, EP of two over mori": (
        "PASS",
        {"dispatch_dtype": "fp8", "cu_count": 304, "ep_size": 2, "transport": "mori", "combine_quant": "fp8_blockwise"},
    ),
    "fp8 of gfx950, EP of two over mori": (
        "PASS",
        {"dispatch_dtype": "fp8", "cu_count": 256, "ep_size": 2, "transport": "mori", "combine_quant": "fp8_blockwise"},
    ),
    "fp8 of another device": ("UNSUPPORTED", {"dispatch_dtype": "fp8", "cu_count": 304, "fp8_format": "e4m3fn"}),
    "a shape that cannot be shuffled": ("INVALID", {"hidden_size": 144}),
    "a shape smaller than any tile": ("INVALID", {"model": "tiny-odd"}),
    "a shape that is not of whole tiles": (
        "UNSUPPORTED",
        {"hidden_size": 320, "intermediate_size": 320, "cu_count": 80},
    ),
    "aiter 3933, one bucket is wrong": ("CORRUPT", {"tokens": 1, "limit": 4, "aiter_habits": "wrong-bucket-4"}),
    "aiter 3933, that bucket is not taken": ("PASS", {"limit": 32, "aiter_habits": "wrong-bucket-4"}),
    "vllm 53108, mostly padding": ("BASELINE_WRONG", {"aiter_habits": "zero-rows"}),
    "aiter 3997, split-k unset": (
        "CORRUPT",
        {
            "dispatch_dtype": "fp8",
            "cu_count": 256,
            "tokens": [1, 0, 0, 0],
            "limit": 1,
            "hidden_size": 512,
            "topk": 2,
            "aiter_habits": "unset-split-k",
        },
    ),
    "a fault is injected": ("BASELINE_WRONG", {"inject": "flipped-expert-bit:rank=1"}),
    "rows past the cut are lost": ("UNDER_LIMIT", {"limit": "max-recv-1", "policy": "unchecked"}),
}


def write_cases(path: Path) -> Path:
    cases = [{"name": name, "expect": verdict} | values for name, (verdict, values) in CASES.items()]
    path.write_text(json.dumps({"defaults": TINY, "include": cases}))
    return path


def test_each_public_aiter_bug_ends_in_its_expected_verdict(tmp_path: Path) -> None:
    suite = write_cases(tmp_path / "aiter.json")
    done = Run(tmp_path / "out", "suite", suite, "--nproc", "4")
    assert done.exit_code == 0, done.stdout + done.stderr
    reports = done.reports
    assert done.verdicts == {name: CASES[name][0] for name in CASES}
    assert all(report["emulated"] for report in reports)
    assert all("distbench.experts.aiter.emulated for aiter" in report["stand_ins"] for report in reports)
    passed, injected = (report for report in reports if report["name"] in {"bf16", "a fault is injected"})
    assert injected["ranks"][0]["packages"]["aiter"]["version"]
    facts = passed["ranks"][0]["packages"]["aiter"]
    assert facts["version"]
    assert any("[fused_moe] using 2stage default for (304, 256," in line for line in facts["log"])


@pytest.mark.parametrize(("cu_count", "fp8"), [("304", "e4m3fnuz"), ("256", "e4m3fn")])
def test_case_with_both_stand_ins_passes(tmp_path: Path, cu_count: str, fp8: str) -> None:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items() if key != "emulate"]
    flags += ["--dispatch-dtype=fp8", f"--cu-count={cu_count}", "--transport=mori", "--emulate"]
    done = Run(tmp_path / "out", "run", "--nproc", "4", *flags)
    assert done.exit_code == 0, done.stdout + done.stderr
    both = "distbench.transport.mori.emulated for mori, distbench.experts.aiter.emulated for aiter"
    assert f"PASS (emulated: {both}): truncated == repadded == control == padded == oracle" in done.stdout
    report = done.report
    assert (report["case"]["fp8_format"], report["sources"]["fp8_format"]) == (fp8, "device")


@pytest.mark.parametrize(
    "quirk",
    [
        {"aiter_habits": "all-rows"},
        {"aiter_habits": "past-rows-fault", "limit": "2", "policy": "unchecked"},
        {"aiter_habits": "fault-at-304-336", "limit": "304", "max_dispatch_tokens_per_rank": "256"},
    ],
)
@pytest.mark.parametrize(
    ("transport", "moved_by"), [("collective", "collective"), ("mori", "distbench.transport.mori.emulated")]
)
def test_kernel_fault_is_reported_with_its_arm(
    quirk: dict[str, str], transport: str, moved_by: str, tmp_path: Path
) -> None:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in (TINY | quirk).items() if key != "emulate"]
    flags += [f"--transport={transport}", "--emulate"]
    done = Run(tmp_path / "out", "run", "--nproc", "2", *flags)
    assert done.exit_code == 3, done.stderr
    out = done.stdout
    arm = "padded" if "all-rows" in quirk.values() else "truncated"
    assert f"ended by SIGABRT in {arm}/experts" in out
    assert f"RANK_FAULT (emulated: {moved_by} for mori, distbench.experts.aiter.emulated for aiter)" in out


def test_aiter_experts_without_the_package_are_unsupported(tmp_path: Path) -> None:
    done = Run(tmp_path / "out", "run", "--nproc", "2", "--model", "tiny", "--experts", "aiter")
    assert done.exit_code == 77
    assert "UNSUPPORTED: experts aiter: the package amd-aiter is not installed" in done.stderr
    assert not list((tmp_path / "out").glob("report.json"))
