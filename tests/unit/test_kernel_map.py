"""`distbench kernels`: the map holds for every row count, and says what a limit changes."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distbench import devices
from distbench.cli import main
from distbench.experts.aiter.package import installed_tables
from distbench.experts.rules import BUCKET_RULES
from distbench.experts.selection import KernelSelector, LayerKey
from distbench.kernel_map import effect_of, limit_effects, make_table_selector, map_kernels
from distbench.resolve import Layer, resolve_case

LAYER = LayerKey(num_local_experts=32, topk=8, model_dim=7168, inter_dim=2048, cu_count=256)
ROOT = Path(__file__).parents[2]
HEADER = (
    "cu_num,token,model_dim,inter_dim,expert,topk,act_type,dtype,q_dtype_a,q_dtype_w,q_type,use_g1u1,doweight_stage1,"
    "block_m,ksplit,us1,kernelName1,us2,kernelName2,us"
)


def table(tmp_path: Path, modes: dict[int, str], topk: int = 7) -> str:
    key = f"7168,2048,32,{topk},ActivationType.Silu,torch.bfloat16,torch.bfloat16,torch.bfloat16,QuantType.No,1,0"
    lines = [f"256,{token},{key},32,0,1.5,one,2.5,flydsl_two_{mode},4.0" for token, mode in modes.items()]
    path = tmp_path / "tuned.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize("release", BUCKET_RULES)
@pytest.mark.parametrize("padded", [1, 1000, 16383, 140_000])
def test_the_map_holds_for_every_row_count(release: str, padded: int) -> None:
    rules = BUCKET_RULES[release]
    found = map_kernels(LAYER, release, rules, (), padded)
    selector = make_table_selector(LAYER, rules, ())
    assert found.spans[0].first == 1
    assert found.spans[-1].last == padded
    for span, following in zip(found.spans, [*found.spans[1:], None], strict=True):
        assert following is None or following.first == span.last + 1
        for rows in (span.first, (span.first + span.last) // 2, span.last):
            choice = selector.choose(rows)
            assert (choice.bucket, choice.block_m, choice.stage1) == (span.bucket, span.block_m, span.stage1)
            assert effect_of(selector, rows, padded + 1) == _against(selector, rows, padded + 1)
    assert found.spans[-1].limit_here == "same kernel"


def _against(selector: KernelSelector, rows: int, padded: int) -> str:
    before, after = selector.choose(padded), selector.choose(rows)
    if before.same_kernel(after):
        return "same kernel"
    return "other kernel"  # heuristics are all atomic


def test_limits_that_turn_an_ordered_sum_into_an_atomic_one(tmp_path: Path) -> None:
    path = table(tmp_path, {64: "reduce", 128: "atomic", 256: "atomic"})
    effects = limit_effects(LAYER, BUCKET_RULES["0.1.16"], [path], 256, [64, 128, 250, 256, 300])
    assert [one.effect for one in effects] == ["atomic to ordered", "same kernel", "same kernel", "nothing", "nothing"]
    back = limit_effects(LAYER, BUCKET_RULES["0.1.16"], [path], 64, [20])
    assert back[0].effect == "ordered to atomic"


def test_the_same_limit_does_nothing_on_another_release() -> None:
    (effect,) = limit_effects(LAYER, BUCKET_RULES["0.1.16"], (), 4096, [1024])
    by_release = effect.by_release
    assert by_release["0.1.5"] == "same kernel"
    assert set(by_release) == set(BUCKET_RULES)
    (small,) = limit_effects(LAYER, BUCKET_RULES["0.1.16"], (), 4096, [16])
    assert small.effect == "other kernel"


def test_times_and_kernels_come_from_the_table(tmp_path: Path) -> None:
    path = table(tmp_path, {64: "reduce"})
    found = map_kernels(LAYER, "0.1.20", BUCKET_RULES["0.1.16"], [path], 200)
    tuned = [span for span in found.spans if span.source == "tuned"]
    assert [(span.first, span.last, span.us1, span.us2, span.us, span.ordered) for span in tuned] == [
        (33, 64, 1.5, 2.5, 4.0, True)
    ]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["kernels", "--model", "deepseek-v3", "--cu-count", "256", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = run(capsys, "--kernel-table", table(tmp_path, {64: "reduce"}), "--limits", "64,40000")
    assert "gfx950 with 256 compute units" in out
    assert "flydsl_two_reduce" in out
    assert "limit 64: bucket 64, atomic to ordered. By release: other kernel: 0.1.5 to before 0.1.16" in out
    assert "limit 40000: bucket 32768, nothing" in out


def test_the_command_prints_json_and_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = table(tmp_path, {64: "reduce"})
    document = json.loads(run(capsys, "--kernel-table", path, "--format", "json"))
    lines = list(csv.DictReader(io.StringIO(run(capsys, "--kernel-table", path, "--format", "csv"))))
    assert [line["stage1"] for line in lines] == [span["stage1"] for span in document["spans"]]
    assert document["padded"] == 32768
    assert document["tables"] == [path]


def node_of(folder: Path, number: int, simds: int, version: int = 90500) -> None:
    node = folder / str(number)
    node.mkdir()
    lines = [f"cpu_cores_count {0 if simds else 64}", f"simd_count {simds}", f"simd_per_cu {4 if simds else 0}"]
    devices.architecture.cache_clear()
    (node / "properties").write_text("\n".join([*lines, f"gfx_target_version {version if simds else 0}", ""]))


@pytest.fixture
def kfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder in which the kernel driver's devices are looked for; there is a CPU."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    monkeypatch.setattr(devices, "_KFD_NODES", folder)
    monkeypatch.delenv("CU_NUM", raising=False)
    node_of(folder, 0, 0)
    yield folder
    devices.architecture.cache_clear()


def test_compute_units_are_this_nodes_or_said_to_be_assumed(
    kfd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: str) -> str:
        assert main(["kernels", "--model", "deepseek-v3", *arguments]) == 0
        return capsys.readouterr().out

    assert "gfx942 with 304 compute units (assumed: this node has no ROCm device; --cu-count" in told()
    for number in (1, 2):
        node_of(kfd, number, 1024)
    assert "gfx950 with 256 compute units (this node's), bf16" in told()
    assert "gfx942 with 80 compute units, bf16" in told("--cu-count", "80")
    document = json.loads(told("--format", "json"))
    assert (document["layer"]["cu_count"], document["cu_count_from"]) == (256, "node")
    monkeypatch.setenv("CU_NUM", "80")
    assert "80 compute units (this node's)" in told()
    monkeypatch.delenv("CU_NUM")
    node_of(kfd, 3, 1216)
    assert devices.compute_units() is None


def test_the_fp8_of_a_case_is_that_of_the_device(kfd: Path) -> None:
    def found(**values: Any) -> tuple[str, str]:
        resolved = resolve_case([Layer("test", {"model": "tiny", "dispatch_dtype": "fp8"} | values)], 4)
        return resolved.case.fp8_format, resolved.sources["fp8_format"]

    assert devices.architecture() == ""
    assert found() == ("e4m3fn", "device")
    node_of(kfd, 1, 1216, 90402)
    assert devices.architecture() == "gfx942"
    assert found() == ("e4m3fnuz", "device")
    assert found(device="cpu") == ("e4m3fn", "device")
    assert found(fp8_format="e4m3fn") == ("e4m3fn", "test")
    assert found(emulate=True, cu_count=256) == ("e4m3fn", "device")
    node_of(kfd, 2, 1024, 90500)
    assert devices.architecture() == ""
    assert found(emulate=True) == ("e4m3fnuz", "device")


@pytest.mark.parametrize("arguments", [["kernels", "--model", "deepseek-v3"], ["doctor", "--json"], ["presets"]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "distbench", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("distbench.commands.presets.print_table", broken)
    with pytest.raises(BrokenPipeError):
        main(["presets"])


@pytest.mark.parametrize("limits", ["0", "-4", "many"])
def test_limits_that_are_none_are_refused(limits: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", f"--limits={limits}"]) == 2
    assert "--limits" in capsys.readouterr().err


def test_the_environments_limit_is_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_MORI_MOE_MAX_INPUT_TOKENS", "512")
    assert "limit 512: bucket 512" in run(capsys)


def test_tables_of_the_environment_replace_all_others() -> None:
    assert installed_tables({"AITER_CONFIG_FMOE": "/a.csv:/b.csv"}) == ["/a.csv", "/b.csv"]
    assert installed_tables({}) == []
