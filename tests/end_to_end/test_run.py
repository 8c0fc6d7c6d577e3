"""`distbench run` as a user types it: output, report and exit code.

The first case, and the commands that are refused, run as processes; the others share the start of this one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distbench.case.sglang_releases import LIMIT
from distbench.cli.main import main
from distbench.verify.gather import ROUND_BYTES
from tests.end_to_end.in_process import Run, tiny
from tests.end_to_end.launches import Bench, slowed

LARGE = ("--hidden-size", "2048", "--intermediate-size", "256", "--tokens", "32")


def test_tiny_case_passes_and_reports_both_kernels(tmp_path: Path) -> None:
    with Bench(tmp_path / "out", "run", "--nproc=4", "--model=tiny") as run:
        assert run.finish() == 0
    last_line = run.stdout.rstrip("\n").splitlines()[-1]
    assert last_line.startswith("PASS (emulated: collective for mori, reference for aiter): truncated == ")
    assert run.report["verdict"] == "PASS"
    assert run.report["emulated"] is True
    for rank in run.report["ranks"]:
        padded, truncated = rank["kernels"]["padded"], rank["kernels"]["truncated"]
        assert (padded["rows"], truncated["rows"]) == (16384, 64)
        assert padded["block_m"] != truncated["block_m"]
        assert len({rank["digests"][arm] for arm in ("padded", "control", "repadded", "truncated", "oracle")}) == 1


@pytest.mark.parametrize(
    ("nproc", "tokens"),
    [
        (1, "9"),
        (2, "0,5"),
        (3, "4,0,11"),
        (4, "2,0,8,5"),
        (5, "3"),
        (6, "0,3,3,0,1,12"),
        (7, "1,0,0,9,2,7,1"),
        (8, "0,1,7,33,0,2,2,40"),
    ],
)
def test_limit_of_max_recv_passes_and_one_row_less_names_the_lost_rows(tmp_path: Path, nproc: int, tokens: str) -> None:
    run = tiny(tmp_path, nproc, "--tokens", tokens, "--limit", "max-recv")
    assert (run.exit_code, run.report["verdict"], run.report["differing"]) == (0, "PASS", None)
    short = tiny(tmp_path, nproc, "--tokens", tokens, "--limit", "max-recv-1", "--policy", "unchecked")
    report = short.report
    assert (short.exit_code, report["verdict"]) == (1, "UNDER_LIMIT")
    sent = report["sent"]
    assert sent["ranks_per_block"] == 1
    assert [sum(column) for column in zip(*sent["rows"], strict=True)] == [
        rank["total_recv"] for rank in report["ranks"]
    ]
    fullest = max(rank["total_recv"] for rank in report["ranks"])
    at_maximum = [rank["rank"] for rank in report["ranks"] if rank["total_recv"] == fullest]
    named = [reason["rank"] for reason in report["reasons"] if reason["code"] == "limit-below-total-recv"]
    assert named == at_maximum
    assert report["lost"]["by_rank"] == {str(rank): 1 for rank in at_maximum}
    lost = {tuple(token) for token in report["lost"]["tokens"]}
    damaged = next(one for one in report["comparison"] if one["arms"] == ["padded", "truncated"])
    assert damaged["differing_tokens"] == len(lost)
    (cause,) = (one for one in report["diagnosis"] if one["cause"] == "lost by the cut")
    assert cause["confidence"] == "certain"
    assert {tuple(token) for token in cause["tokens"]} == lost
    assert report["differing"]["arms"] == ["padded", "truncated"]
    counts = [rank["tokens"] for rank in report["ranks"]]
    places = {(sum(counts[:rank]) + token) // report["differing"]["tokens_per_cell"] for rank, token in lost}
    assert {place for place, cells in enumerate(report["differing"]["cells"]) if cells.strip("0")} == places


@pytest.mark.parametrize(
    ("environ", "kernel"), [({}, "shared_memory"), ({"DISTBENCH_SHARED_MEMORY": "0"}, "all_to_all")]
)
def test_report_names_the_path_of_rows_between_ranks(tmp_path: Path, environ: dict[str, str], kernel: str) -> None:
    run = tiny(tmp_path, 3, "--tokens", "0,9,5", **environ)
    assert (run.exit_code, run.report["verdict"]) == (0, "PASS")
    assert run.report["transport"]["kernel"] == kernel


def test_limit_below_total_recv_is_refused_on_all_ranks(tmp_path: Path) -> None:
    run = tiny(tmp_path, 3, "--tokens", "0,9,5", "--limit", "max-recv-1")
    assert (run.exit_code, run.report["verdict"]) == (1, "UNDER_LIMIT")
    assert "refused on all ranks" in run.stdout
    assert all(set(rank["kernels"]) == {"padded", "control"} for rank in run.report["ranks"])
    assert run.report["lost"]["rows"] >= 1


def test_limit_of_max_recv_is_proven_for_this_batch_only(tmp_path: Path) -> None:
    short = tiny(tmp_path, 4, "--tokens", "64", "--limit", "max-recv-1")
    needed, proof = short.report["limit"]["max_recv"], short.report["limit"]["proof"]
    formula = "sum of tokens over all ranks = 64+64+64+64 = 256"
    assert (needed, proof) == (195, {"status": "unsafe", "bound": 256, "formula": formula})
    assert short.last_line.endswith(
        "a limit of 256 is proven for any routing of these token counts, 195 is enough for this batch only"
    )
    enough = tiny(tmp_path, 4, "--tokens", "64", "--limit", str(needed))
    assert (enough.exit_code, enough.report["limit"]["proof"]["status"]) == (0, "this batch")
    assert enough.last_line.endswith("not proven for other routings")
    assert enough.report["limit"]["safe"] is True
    assert "limit-not-proven" in {reason["code"] for reason in enough.report["reasons"]}
    other = tiny(tmp_path, 4, "--tokens", "64", "--limit", str(needed), "--seed", "3")
    assert (other.exit_code, other.report["verdict"]) == (1, "UNDER_LIMIT")
    assert other.report["lost"]["rows"] > 0


def test_proven_limit_holds_under_the_routing_that_reaches_the_bound(tmp_path: Path) -> None:
    run = tiny(tmp_path, 4, "--tokens", "64", "--limit", "256", "--seed", "3", "--routing", "fan-in:1")
    assert (run.exit_code, run.report["limit"]["proof"]["status"]) == (0, "proven")
    assert run.report["limit"]["max_recv"] == 256
    assert "limit-not-proven" not in {reason["code"] for reason in run.report["reasons"]}
    assert "not proven" not in run.stdout


def test_guard_policy_raises_a_limit_below_total_recv(tmp_path: Path) -> None:
    run = tiny(tmp_path, 2, "--limit", "3", "--policy", "guard")
    assert (run.exit_code, run.report["verdict"]) == (0, "PASS")
    for rank in run.report["ranks"]:
        assert rank["kernels"]["truncated"]["rows"] == rank["total_recv"]


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        (("--tokens", "65", "--max-dispatch-tokens-per-rank", "64"), "OVERFLOW"),
        (("--routing", "fan-in:1", "--prealloc-max-recv-tokens", "20"), "OVERFLOW"),
    ],
)
def test_batch_beyond_a_capacity_is_overflow(tmp_path: Path, arguments: tuple[str, ...], verdict: str) -> None:
    run = tiny(tmp_path, 2, *arguments)
    assert (run.exit_code, run.report["verdict"]) == (1, verdict)


@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2", "hot-rank:1", "fan-in:0", "local", "duplicates"])
def test_every_routing_passes_with_fp8_dispatch(tmp_path: Path, routing: str) -> None:
    run = tiny(
        tmp_path, 3, "--routing", routing, "--dispatch-dtype", "fp8", "--gather", "digests", "--tokens", "0,9,33"
    )
    assert (run.exit_code, run.report["verdict"]) == (0, "PASS")


@pytest.mark.parametrize(
    ("table", "numerics", "verdict"),
    [
        ("splitk", "gaussian", "DRIFT"),
        ("atomic", "gaussian", "NONDETERMINISTIC"),
        ("splitk", "exact", "PASS"),
        ("atomic", "exact", "PASS"),
    ],
)
def test_kernel_that_changes_at_the_limit_gives_its_verdict(
    tmp_path: Path, table: str, numerics: str, verdict: str
) -> None:
    run = tiny(tmp_path, 4, *LARGE, "--kernel-table", f"tests/data/{table}.csv", "--numerics", numerics)
    assert run.report["verdict"] == verdict
    assert not run.report["warnings"]
    equal = {tuple(one["arms"]): one["equal"] for one in run.report["comparison"]}
    if verdict == "DRIFT":
        assert equal["padded", "repadded"]
        assert not equal["padded", "truncated"]
        kernels = run.report["ranks"][0]["kernels"]
        assert (kernels["padded"]["ksplit"], kernels["truncated"]["ksplit"]) == (0, 4)
    if verdict == "NONDETERMINISTIC":
        assert not equal["padded", "control"]


def test_require_tolerance_accepts_drift(tmp_path: Path) -> None:
    table = ("--kernel-table", "tests/data/splitk.csv", "--numerics", "gaussian", "--require", "tolerance")
    run = tiny(tmp_path, 4, *LARGE, *table)
    assert (run.exit_code, run.report["verdict"]) == (0, "PASS")
    (drift,) = (reason for reason in run.report["reasons"] if reason["code"] == "kernel-drift")
    assert drift["message"].endswith("within its ideal")


def test_environment_variable_sets_the_limit_and_a_flag_overrides_it(tmp_path: Path) -> None:
    run = tiny(tmp_path, 2, **{LIMIT: "40", "MORI_MOE_MAX_INPUT_TOKENS": "8"})
    assert run.report["limit"]["effective"] == 40
    assert run.report["limit"]["source"] == f"env:{LIMIT}"
    (warning,) = run.report["warnings"]
    assert warning == "set and not used by this case: MORI_MOE_MAX_INPUT_TOKENS=8 (this case does not run mori)"
    assert warning in " ".join(run.stdout.split())
    assert tiny(tmp_path, 2, "--limit", "41", **{LIMIT: "40"}).report["limit"]["effective"] == 41


def test_unused_variable_is_listed_once_in_console_and_report(tmp_path: Path) -> None:
    run = tiny(tmp_path, 2, "--tokens", "2", ATOM_X="1", SGLANG_MORI_FP8_DISP="True")
    (warning,) = run.report["warnings"]
    assert warning.startswith("set and not used by this case: ATOM_X=1 (nothing that distbench runs reads it); ")
    assert warning.endswith("SGLANG_MORI_FP8_DISP=True (SGLang 0.5.23 does not read it, 0.5.9 to 0.5.20 do)")
    assert " ".join((run.stdout + run.stderr).split()).count("ATOM_X=1") == 1


def test_unused_key_is_listed_once_in_console_and_report(tmp_path: Path) -> None:
    run = tiny(tmp_path, 2, "--tokens", "2", "--launch-mode", "AUTO", "--gpu-per-node", "2")
    (warning,) = run.report["warnings"]
    assert warning == (
        "keys set and not used by this case: gpu_per_node=2, launch_mode=AUTO (transport collective does not use it)"
    )
    assert " ".join((run.stdout + run.stderr).split()).count("launch_mode=AUTO") == 1
    refused = tiny(tmp_path, 2, "--aiter-habits", "anything")
    assert refused.exit_code == 2
    assert "'anything' is no quirk" in refused.stderr


def test_run_of_a_case_file_writes_a_report_that_show_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "case.toml"
    file.write_text('model = "tiny-odd"\ntokens = [3, 0]\nrouting = "local"\nseed = 5\n')
    run = Run(tmp_path, "run", "--nproc", "2", "--case", file, "--json", tmp_path / "deep" / "copy.json")
    assert run.exit_code == 0
    assert run.report["sources"]["seed"] == f"file:{file}"
    assert json.loads((tmp_path / "deep" / "copy.json").read_text()) == run.report
    assert main(["show", str(tmp_path / "report.json")]) == 0
    assert capsys.readouterr().out == run.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--limit", "-1"),
        ("--routing", "fan-in:9"),
        ("--routing", "spiral"),
        ("--topk", "33", "--num-experts", "256", "--model", "tiny", "--hidden-size", "4"),
        ("--num-experts", "12"),
        ("--nproc", "0"),
        ("--kernel-table", "/nonexistent"),
        ("--case", "/nonexistent.toml"),
        ("--frobnicate",),
    ],
)
def test_invalid_cases_are_refused_in_one_line_within_two_seconds(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    start = time.monotonic()
    with Bench(tmp_path / "out", "run", *arguments) as run:
        assert run.finish() == 2
        seconds = time.monotonic() - start
    assert run.stderr.startswith("distbench: INVALID: ")
    assert run.stderr.count("\n") == 1
    assert seconds < 2 or seconds < 2 * slowed()


def test_repeats_of_the_truncated_arm_count_as_timed_iterations(tmp_path: Path) -> None:
    run = tiny(tmp_path, 2, "--repeats", "3")
    assert run.report["timing"]["padded"]["experts"]["iterations"] == 1
    assert run.report["timing"]["truncated"]["experts"]["iterations"] == 3


def test_report_has_every_documented_key(tmp_path: Path) -> None:
    report = tiny(tmp_path, 2).report
    promised = {
        "schema", "verdict", "exit_code", "reasons", "emulated", "stand_ins", "case", "limit", "environment", "ranks",
        "comparison", "lost", "first_divergence", "diagnosis", "timing", "memory",
    }  # fmt: skip
    assert promised <= report.keys()
    assert report["schema"] == "distbench.report/1"
    assert len(report["case"]["hash"]) == 64
    assert Counter(rank["rank"] for rank in report["ranks"]) == {0: 1, 1: 1}


@pytest.mark.parametrize("nproc", [2, 8])
def test_memory_of_rank_0_in_gather_is_bounded(tmp_path: Path, nproc: int) -> None:
    tokens, hidden, arms = 1024, 2048, 5
    gathered_bytes = nproc * tokens * hidden * 2 * arms
    run = tiny(
        tmp_path, nproc, "--gather", "rows", "--hidden-size", str(hidden), "--tokens", str(tokens),
        "--max-dispatch-tokens-per-rank", str(tokens), "--topk", "1", "--intermediate-size", "64",
        "--numerics", "exact",
    )  # fmt: skip
    assert run.report["gather"] == "rows"
    added = run.report["memory"]["gather"]["peak_bytes_added_on_rank_0"]
    assert added <= 3 * ROUND_BYTES
    if nproc == 8:
        assert gathered_bytes > 9 * ROUND_BYTES


def test_recorded_routing_is_converted_and_run_with_the_bits_of_the_oracle(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).random((2, 3, 18, 16)).argsort(axis=-1)[..., :4]
    np.save(tmp_path / "ids.npy", ids)
    trace = str(tmp_path / "trace.safetensors")
    convert = ("trace", "convert", str(tmp_path / "ids.npy"), "--out", trace, "--ep-size=4", "--num-experts=16")
    assert main(convert) == 0
    hit = (ids[1, 2, :, :, None] // 4 == np.arange(4)).any(axis=1)
    routing = ("--routing", f"trace:{trace}@1.2", "--tokens", "5,5,4,4", "--numerics", "exact")
    run = tiny(tmp_path / "out", 4, *routing, "--limit", "max-recv")
    assert run.exit_code == 0
    assert [rank["total_recv"] for rank in run.report["ranks"]] == hit.sum(axis=0).tolist()
    short = tiny(tmp_path / "short", 4, *routing, "--limit", "max-recv-1", "--policy", "unchecked")
    assert short.report["verdict"] == "UNDER_LIMIT"
