"""`distbench kernels`: the map of every row count, and the effect of a limit."""

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

from distbench.case.environment import read_environment
from distbench.case.resolve import Layer, resolve_case
from distbench.cli.main import main
from distbench.experts import make_selector
from distbench.experts.aiter.package import installed_tables
from distbench.experts.selection.choice import KernelSelector, LayerKey
from distbench.experts.selection.lookup import QUANTS, Lookup
from distbench.experts.selection.releases import BUCKET_RULES
from distbench.tools.kernel_map import effect_of, limit_effects, make_table_selector, map_kernels
from distbench.utils import devices

LAYER = LayerKey(num_local_experts=32, topk=8, model_dim=7168, inter_dim=2048, cu_count=256)
ROOT = Path(__file__).parents[3]
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
def test_kernel_map_equals_the_selector_for_every_row_count(release: str, padded: int) -> None:
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


def test_limit_that_selects_an_atomic_kernel_for_an_ordered_one_is_reported(tmp_path: Path) -> None:
    path = table(tmp_path, {64: "reduce", 128: "atomic", 256: "atomic"})
    effects = limit_effects(LAYER, BUCKET_RULES["0.1.16"], [path], 256, [64, 128, 250, 256, 300])
    assert [one.effect for one in effects] == ["atomic to ordered", "same kernel", "same kernel", "nothing", "nothing"]
    back = limit_effects(LAYER, BUCKET_RULES["0.1.16"], [path], 64, [20])
    assert back[0].effect == "ordered to atomic"


def test_effect_of_a_limit_is_listed_per_release() -> None:
    (effect,) = limit_effects(LAYER, BUCKET_RULES["0.1.16"], (), 4096, [1024])
    by_release = effect.by_release
    assert by_release["0.1.5"] == "same kernel"
    assert set(by_release) == set(BUCKET_RULES)
    (small,) = limit_effects(LAYER, BUCKET_RULES["0.1.16"], (), 4096, [16])
    assert small.effect == "other kernel"


def test_kernel_map_takes_times_and_names_from_the_tuned_table(tmp_path: Path) -> None:
    path = table(tmp_path, {64: "reduce"})
    found = map_kernels(LAYER, "0.1.20", BUCKET_RULES["0.1.16"], [path], 200)
    tuned = [span for span in found.spans if span.source == "tuned"]
    assert [(span.first, span.last, span.us1, span.us2, span.us, span.ordered) for span in tuned] == [
        (33, 64, 1.5, 2.5, 4.0, True)
    ]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["kernels", "--model", "deepseek-v3", "--cu-count", "256", *arguments]) == 0
    return capsys.readouterr().out


def test_kernels_command_prints_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = run(capsys, "--kernel-table", table(tmp_path, {64: "reduce"}), "--limits", "64,40000")
    assert "gfx950 with 256 compute units" in out
    assert "flydsl_two_reduce" in out
    assert "limit 64: bucket 64, atomic to ordered. By release: no verdict: 0.1.5 to before 0.1.16" in out
    assert "limit 40000: bucket 32768, nothing" in out


MX_KEY = (
    "7168,2048,32,7,ActivationType.Silu,torch.bfloat16,torch.float4_e2m1fn_x2,torch.float4_e2m1fn_x2,"
    "QuantType.per_1x32,1,0"
)


def mx_table(tmp_path: Path, *rows: str) -> str:
    path = tmp_path / "dsv3_fp4_tuned_fmoe.csv"
    lines = rows or tuple(f"256,{token},{MX_KEY},32,-1,1.5,one,2.5,,4.0" for token in (1, 64, 96, 32768))
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return str(path)


def test_tuned_table_without_a_row_for_the_layer_gives_no_verdict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = mx_table(tmp_path)
    command = ["kernels", "--model", "deepseek-v3", "--cu-count", "256", "--kernel-table", path, "--limits", "64"]
    assert main(command) == 2
    out, error = capsys.readouterr()
    assert f"{path}: 0 of 4 rows match; nearest differs in q_dtype_a torch.float4_e2m1fn_x2" in out
    assert "q_type QuantType.per_1x32" in out
    assert "key looked up: cu_num 256, model_dim 7168, inter_dim 2048, expert 32, topk 7, dtype torch.bfloat16" in out
    assert "topk: one less than the layer's, as aiter counts it with an expert_mask since 0.1.16" in out
    assert "limit 64: bucket 64, no verdict" in out
    assert "no tuned row matches: no verdict on any limit" in out
    assert "same kernel" not in out
    assert "no row for this key" in error
    document = json.loads(_out(capsys, [*command, "--format", "json"]))
    assert {span["limit_here"] for span in document["spans"]} == {"unknown"}
    assert [one["effect"] for one in document["limits"]] == ["unknown"]
    assert document["matches"][0]["rows"] == 4


def _out(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    main(command)
    return capsys.readouterr().out


def test_quant_option_selects_rows_and_rows_outside_any_bucket_are_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = mx_table(tmp_path)
    out = run(capsys, "--kernel-table", path, "--quant", "a4w4", "--limits", "64,128,40000")
    assert "compute units, a4w4: model_dim 7168" in out
    assert f"{path}: 4 of 4 rows match\n" in out
    assert "no number of rows leads to bucket 96 of them" in out
    assert "limit 64: bucket 64, same kernel" in out
    assert "limit 128: bucket 128, no verdict: no tuned row for its kernel" in out
    assert "unnamed_stage2_bm32" in out
    document = json.loads(run(capsys, "--kernel-table", path, "--quant", "a4w4", "--format", "json"))
    assert [span["source"] for span in document["spans"]].count("tuned") == 3
    assert document["key"]["q_type"] == "QuantType.per_1x32"


@pytest.mark.parametrize("quant", QUANTS)
def test_every_quantisation_selects_its_own_rows(
    quant: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kind = QUANTS[quant]
    types = ",".join((*kind.dtypes("gfx950"), f"QuantType.{kind.q_type}"))
    key = f"7168,2048,32,7,ActivationType.Gelu,torch.bfloat16,{types},1,1"
    path = mx_table(tmp_path, f"256,64,{key},32,0,1.5,one,2.5,two,4.0")
    asked = ("--quant", quant, "--activation", "gelu", "--doweight-stage1")
    assert "1 of 1 rows match" in run(capsys, "--kernel-table", path, *asked)
    assert main(["kernels", "--model", "deepseek-v3", "--cu-count", "256", "--kernel-table", path, *asked[:4]]) == 2
    assert "nearest differs in doweight_stage1 True" in capsys.readouterr().out


def test_unknown_heuristics_give_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert "limit 64: bucket 64, no verdict" in run(capsys, "--quant", "fp8-per-token", "--limits", "64")
    assert "limit 32: bucket 32, other kernel" in run(capsys, "--quant", "fp8", "--limits", "32")


def test_aiter_variables_change_the_kernel_map_and_are_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_CONFIG_FMOE", table(tmp_path, {64: "reduce"}))
    assert "flydsl_two_reduce" in run(capsys)
    monkeypatch.setenv("AITER_FLYDSL_EP_NO_FAKE_EXPERT", "1")
    assert "aiter's choice may depend on it: AITER_FLYDSL_EP_NO_FAKE_EXPERT=1" in run(capsys)
    monkeypatch.setenv("AITER_BYPASS_TUNE_CONFIG", "1")
    out = run(capsys, "--limits", "64")
    assert "flydsl_two_reduce" not in out
    assert "aiter_bypass_tune: tuned rows are ignored" in out
    assert "limit 64: bucket 64, other kernel" in out
    monkeypatch.setenv("AITER_KSPLIT", "6")
    assert "aiter_ksplit 6" in run(capsys, "--quant", "fp8")
    spans = json.loads(run(capsys, "--quant", "fp8", "--format", "json"))["spans"]
    assert [span["ksplit"] for span in spans] == [6] * 6 + [0] * 10


def test_kernels_command_and_run_choose_the_same_kernel_in_one_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_CONFIG_FMOE", table(tmp_path, {64: "reduce"}))
    monkeypatch.setenv("AITER_KSPLIT", "-1")
    layers = [Layer("test", {"model": "deepseek-v3", "cu_count": 256})]
    case = resolve_case([*layers, *read_environment(os.environ)], 8).case
    ours = make_selector(case)
    theirs = make_table_selector(LAYER, ours.rules, [os.environ["AITER_CONFIG_FMOE"]], Lookup(overrides=ours.overrides))
    for rows in (1, 64, 4096):
        assert ours.choose(rows) == theirs.choose(rows)
    assert ours.choose(64).stage2 == "flydsl_two_reduce"


def test_survey_counts_reached_rows_and_names_refused_tables(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mx_table(tmp_path)
    table(tmp_path, {64: "reduce", 96: "reduce"}).replace("tuned.csv", "")
    (tmp_path / "tuned.csv").rename(tmp_path / "tuned_fmoe.csv")
    (tmp_path / "untuned_fmoe.csv").write_text("token\n")
    command = ["kernels", "--survey", str(tmp_path)]
    assert main([*command, "--format", "json"]) == 0
    found = {one["table"]: one for one in json.loads(capsys.readouterr().out)}
    mx, plain = found["dsv3_fp4_tuned_fmoe.csv"], found["tuned_fmoe.csv"]
    assert (mx["rows"], mx["kernels"], mx["run"]) == (4, 3, 0)
    assert (plain["rows"], plain["kernels"], plain["run"]) == (2, 1, 1)
    assert plain["unreached"] == {"for a bucket that the release does not have": 1}
    (tmp_path / "broken_fmoe.csv").write_text("token\n1\n")
    assert main(command) == 2
    assert "column cu_num is missing" in " ".join(capsys.readouterr().out.split())


def test_kernels_command_prints_json_and_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
    """Folder of the kernel driver's devices; it has a CPU."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    monkeypatch.setattr(devices, "_KFD_NODES", folder)
    monkeypatch.delenv("CU_NUM", raising=False)
    node_of(folder, 0, 0)
    yield folder
    devices.architecture.cache_clear()


def test_compute_units_are_read_from_this_node_or_marked_as_assumed(
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


def test_fp8_format_of_a_case_defaults_to_that_of_the_device(kfd: Path) -> None:
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
def test_closed_standard_output_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "distbench", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    os.close(writer)
    progress = f"distbench: {arguments[0]}: "
    assert (done.returncode, [line for line in done.stderr.splitlines() if not line.startswith(progress)]) == (141, [])


def test_broken_pipe_other_than_standard_output_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("distbench.cli.presets.print_table", broken)
    with pytest.raises(BrokenPipeError):
        main(["presets"])


@pytest.mark.parametrize("limits", ["0", "-4", "many"])
def test_invalid_limits_option_is_refused(limits: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", f"--limits={limits}"]) == 2
    assert "--limits" in capsys.readouterr().err


def test_kernels_command_includes_the_limit_of_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_MORI_MOE_MAX_INPUT_TOKENS", "512")
    assert "limit 512: bucket 512" in run(capsys)


def test_tables_named_by_the_environment_replace_the_installed_ones() -> None:
    assert installed_tables({"AITER_CONFIG_FMOE": "/a.csv:/b.csv"}) == ["/a.csv", "/b.csv"]
    assert installed_tables({}) == []


def test_survey_of_a_folder_without_tables_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["kernels", "--survey", str(folder)]) == 2
        assert f"--survey {folder}: no tuned fmoe table" in capsys.readouterr().err
