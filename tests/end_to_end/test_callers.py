"""Callers as users start them: their report, a failing pass, and the refusals before a rank starts."""

from __future__ import annotations

import json
from pathlib import Path

from distbench.callers.sglang.definitions import DISPATCHER, RUNNER
from distbench.callers.vllm.definitions import DEFINITIONS as VLLM
from distbench.case.atom_folder import KERNEL, folder_digest
from distbench.case.sglang_releases import NEWEST
from tests import synthetic_vllm
from tests.end_to_end.in_process import Run, tiny
from tests.slim_wheel import atom_folder, slim_wheel, vllm_wheel

LAYER = ("--tokens", "5,7", "--max-dispatch-tokens-per-rank", "64", "--experts", "aiter", "--emulate")
NUMERICS = ("--numerics", "exact")


def production(out: Path, wheel: str, *more: str) -> Run:
    return tiny(out, 2, *LAYER, *NUMERICS, "--caller", "sglang", "--caller-wheel", wheel, *more)


def test_report_has_the_callers_code_and_its_rows(tmp_path: Path) -> None:
    run = production(tmp_path / "out", slim_wheel(tmp_path))
    assert run.exit_code == 0
    assert "production == truncated == repadded == control == padded == oracle" in run.last_line
    caller = json.loads((tmp_path / "out" / "report.json").read_bytes())["caller"]
    assert (caller["package"], caller["version"], caller["origin"]) == ("sglang", NEWEST, str(tmp_path / "sglang.whl"))
    assert {DISPATCHER, RUNNER} <= set(caller["files"])
    assert len(caller["sha256"]) == 64
    assert caller["rows"] == {"0": 32, "1": 32}
    assert caller["arguments"] == {"moe_sorting_dispatch_policy": ["2", "0"]}
    line = f"production: sglang {NEWEST}, SHA-256 {caller['sha256'][:12]}, M = 32; arguments of fused_moe unlike"
    assert line in " ".join(run.stdout.split())


def test_wrong_cut_is_corrupt_and_replays_from_its_bundle_with_the_flags(tmp_path: Path) -> None:
    cut = "            topk_weights = topk_weights[:mori_max]\n"
    wheel = slim_wheel(tmp_path, {RUNNER: (cut, cut.replace("topk_weights[", "topk_weights.flip(0)["))}, "wrong")
    run = production(tmp_path / "out", wheel, "--limit", "12", "--bundle", str(tmp_path / "bundles"))
    assert run.exit_code == 1
    assert "\nCORRUPT" in run.stdout
    assert f"production (sglang {NEWEST})" in run.stdout
    (bundle,) = (tmp_path / "bundles").iterdir()
    flags = ("--caller", "sglang", "--caller-wheel", wheel)
    again = Run(tmp_path / "again", "replay", str(bundle), *flags)
    assert (again.exit_code, "CORRUPT" in again.stdout) == (0, True), again.stdout + again.stderr
    without = Run(tmp_path / "without", "replay", str(bundle))
    assert without.exit_code == 2
    assert "names code to execute; give --caller too" in without.stderr


def test_error_in_the_callers_code_names_it_and_ends_the_rank(tmp_path: Path) -> None:
    wheel = slim_wheel(tmp_path, {RUNNER: ("w1=quant_info.w13_weight,", "w1=quant_info.w2_weight,")}, "exchanged")
    run = production(tmp_path / "out", wheel)
    assert run.exit_code == 3
    assert "RANK_FAULT" in run.last_line
    assert f"in a pass of production, sglang {NEWEST}" in run.last_line


def test_release_without_a_definition_is_unsupported_before_ranks_start(tmp_path: Path) -> None:
    wheel = slim_wheel(tmp_path, {DISPATCHER: ("def mori_recv_bound(", "def recv_bound(")}, "other")
    run = production(tmp_path / "out", wheel)
    assert run.exit_code == 77
    assert f"sglang {NEWEST}: {DISPATCHER} does not define mori_recv_bound" in run.stderr
    assert not (tmp_path / "out" / "ranks").exists()


def test_caller_without_a_wheel_or_an_installed_package_is_unsupported(tmp_path: Path) -> None:
    run = tiny(tmp_path / "out", 2, *LAYER, "--caller", "sglang")
    assert run.exit_code == 77
    assert (
        "caller sglang: the package sglang is not installed; install it, or name a wheel: --caller-wheel" in run.stderr
    )


def test_caller_that_only_a_case_file_names_is_invalid(tmp_path: Path) -> None:
    case = tmp_path / "case.toml"
    case.write_text('caller = "sglang"\nexperts = "aiter"\nemulate = true\n')
    run = tiny(tmp_path / "out", 2, "--case", str(case))
    assert run.exit_code == 2
    assert "names code to execute; give --caller too, or drop the key" in run.stderr


def test_report_of_vllm_has_its_code_and_the_whole_buffer(tmp_path: Path) -> None:
    wheel = vllm_wheel(tmp_path)
    flags = ("--caller", "vllm", "--caller-wheel", wheel)
    run = tiny(tmp_path / "out", 2, *LAYER, *NUMERICS, *flags)
    assert run.exit_code == 0, run.stdout + run.stderr
    assert "production == truncated == repadded == control == padded == oracle" in run.last_line
    caller = json.loads((tmp_path / "out" / "report.json").read_bytes())["caller"]
    assert (caller["package"], caller["version"], caller["origin"]) == ("vllm", synthetic_vllm.VERSION, wheel)
    assert caller["files"] == list(VLLM)
    assert caller["rows"] == {"0": 128, "1": 128}
    assert caller["arguments"] == {
        "expert_mask": ["int32 [9]", "int32 [8]"],
        "swiglu_limit": ["0.0", "None"],
    }


def test_wrong_cut_of_atom_is_corrupt_and_replays_from_its_bundle_with_the_flags(tmp_path: Path) -> None:
    folder = atom_folder(tmp_path, {KERNEL: ("weights[:keep]", "weights.flip(0)[:keep]")})
    flags = ("--caller", "atom", "--caller-folder", folder)
    bundles = tmp_path / "bundles"
    run = tiny(tmp_path / "out", 2, *LAYER, *NUMERICS, *flags, "--atom-graph-bs", "8", "--bundle", str(bundles))
    assert run.exit_code == 1, run.stdout + run.stderr
    label = f"atom {folder_digest(folder)[:12]}"
    assert f"production ({label})" in run.stdout
    (bundle,) = bundles.iterdir()
    again = Run(tmp_path / "again", "replay", str(bundle), *flags)
    assert (again.exit_code, "CORRUPT" in again.stdout) == (0, True), again.stdout + again.stderr
    without = Run(tmp_path / "without", "replay", str(bundle), *flags[:2])
    assert without.exit_code == 2
    assert "name the folder that holds it: --caller-folder" in without.stderr


def test_text_of_atom_without_a_definition_is_unsupported_before_ranks_start(tmp_path: Path) -> None:
    folder = atom_folder(tmp_path, {KERNEL: ("class FusedMoEModularKernel(", "class Kernel(")})
    run = tiny(tmp_path / "out", 2, *LAYER, "--caller", "atom", "--caller-folder", folder)
    assert run.exit_code == 77
    assert f"atom {folder_digest(folder)[:12]}: {KERNEL} does not define FusedMoEModularKernel" in run.stderr
    assert not (tmp_path / "out" / "ranks").exists()
