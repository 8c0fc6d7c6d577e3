"""The command: its proof against routed tokens, steps that exceed a limit, refusals, and what it never says."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from distbench.case.limits import Traffic, resolve_limit
from distbench.case.resolve import load_case_file, resolve_case
from distbench.cli.main import main
from distbench.pipeline.inputs import workload_for
from distbench.utils.signals import Interrupted
from distbench.workload.routing import recv_counts, route
from distbench.workload.routing_spec import ExpertGroup, parse_routing
from tests.pages import read_page, words

QUESTION = ("--model", "deepseek-v3", "--ep-size", "16", "--tokens", "128", "--max-dispatch-tokens-per-rank", "256")
TABLE_HEAD = (
    "cu_num,token,model_dim,inter_dim,expert,topk,act_type,dtype,q_dtype_a,q_dtype_w,q_type,use_g1u1,doweight_stage1,"
    "block_m,ksplit,us1,kernelName1,err1,us2,kernelName2,err2,us,run_1stage\n"
)
TABLE_ROW = (
    "256,{bucket},7168,2048,16,7,ActivationType.Silu,torch.bfloat16,torch.bfloat16,torch.bfloat16,QuantType.No,1,0,"
    "64,0,1.0,moe_ck2stages_gemm1_{bucket},0,2.0,moe_ck2stages_gemm2_{bucket},0,{us},0\n"
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_MORI_MOE_MAX_INPUT_TOKENS", raising=False)


def advice(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "advice.json"
    assert main(["advise", "-q", f"--json={path}", *arguments]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def of(found: dict[str, Any], reason: str) -> dict[str, Any]:
    return next(one for one in found["candidates"] if reason in one["reasons"])


def test_opening_question_is_answered_with_a_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *QUESTION, "--limit", "1536"]) == 0
    out = capsys.readouterr().out
    assert "16 ranks x 128 tokens = 2048." in out
    proven, yours, smaller = out.splitlines()[-3:]
    assert proven.startswith("SGLANG_MORI_MOE_MAX_INPUT_TOKENS=2048 is proven: no routing gives a rank more rows.")
    assert yours.startswith(
        "Yours, 1536, is NOT PROVEN: no drawn step exceeds it; a step does with a chance of 1.7e-214"
    )
    assert yours.endswith("2048 has the same bucket.")
    assert smaller.startswith("Smaller, 1024, is NOT PROVEN: ")
    assert smaller.endswith("It gains nothing: the kernel is that of 2048 rows.")
    found = advice(tmp_path, *QUESTION, "--limit", "1536")
    assert (found["bound"], found["capacity"], found["layers"], found["chance_limit"]) == (2048, 4096, 58, 995)
    assert of(found, "smallest proven")["limit"] == 2048
    assert not of(found, "yours")["proven"]


def test_quiet_prints_the_recommendation_alone_and_json_goes_to_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["advise", "-q", *QUESTION]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["advise", "-q", "--json=-", *QUESTION]) == 0
    read = capsys.readouterr()
    assert json.loads(read.out)["bound"] == 2048
    assert len(read.err.splitlines()) == 3


KINDS = ("uniform", "zipf:1.2", "hot-rank:0", "fan-in:0", "local", "duplicates")


def test_proven_limit_loses_no_row_of_any_routing_and_one_row_less_does(tmp_path: Path) -> None:
    """The bounds of ten random deployments against the rows of routed tokens, in 1,020 random batches."""
    rng = random.Random(3)
    for _ in range(10):
        ranks, local, cap = rng.choice((1, 2, 4, 8)), rng.randint(2, 6), rng.randint(1, 9)
        topk = rng.randint(1, local)
        shape = ("--model=custom", "--hidden-size=64", "--intermediate-size=64", f"--num-experts={ranks * local}")
        found = advice(tmp_path, *shape, f"--topk={topk}", f"--ep-size={ranks}", f"--tokens={cap}", "--steps=1")
        limit, group = of(found, "smallest proven")["limit"], ExpertGroup(ranks, ranks * local, topk)
        for kind in KINDS:
            batches = [[rng.randint(0, cap) for _ in range(ranks)] for _ in range(17)]
            assert max(max(rows) for rows in received(kind, group, batches)) <= limit
        assert max(received("hot-rank:0", group, [[cap] * ranks])[0]) == limit


def received(kind: str, group: ExpertGroup, batches: list[list[int]]) -> list[list[int]]:
    """Rows of each rank in each batch, with other tokens in each."""
    tokens = torch.tensor(batches)
    ranks = torch.arange(group.ep_size).repeat(len(batches)).repeat_interleave(tokens.flatten())
    ids = route(parse_routing(kind), group, seed=1, ranks=ranks, tokens=torch.arange(len(ranks)))
    parts = ids.split(tokens.sum(1).tolist())
    return [recv_counts(part, group.experts_per_rank, group.ep_size).tolist() for part in parts]


def test_steps_above_a_limit_are_counted_and_named(tmp_path: Path) -> None:
    seen = advice(tmp_path, *QUESTION)["seen"]
    assert seen["percentiles"]["50.0%"] <= seen["percentiles"]["99.9%"] <= seen["most"] <= 2048
    enough = of(advice(tmp_path, *QUESTION, "--limit", str(seen["most"])), "yours")
    assert (enough["seen_above"], enough["first_steps_above"]) == (0, [])
    short = of(advice(tmp_path, *QUESTION, "--limit", str(seen["most"] - 1)), "yours")
    assert short["first_steps_above"] == [seen["step"]]
    assert short["seen_above"] == 1


def test_steps_of_a_log_bound_the_rows_of_that_log_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps([[64] * 16, [100] * 16]))
    found = advice(tmp_path, *QUESTION, "--limit", "1600", "--batches", str(path))
    assert found["proof"][-1] == "For these steps alone 1600 rows are enough: the largest has as many tokens."
    assert of(found, "yours")["chance_independent"] == 0
    assert "NOT PROVEN: no step of this traffic can exceed it, but other steps" in capsys.readouterr().out
    assert of(found, "smallest proven")["limit"] == 2048


def test_no_drawn_step_has_more_rows_than_tokens_though_many_sizes_are_rounded_up(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps([[*[128] * (total // 128), total % 128] for total in range(1, 1020)]))
    found = advice(tmp_path, *QUESTION, "--routing=fan-in:0", "--batches", str(path))
    assert found["seen"]["percentiles"]["50.0%"] == 510
    assert found["seen"]["most"] == 1019


def test_shared_and_replicated_experts_are_slots_of_the_kernel(tmp_path: Path) -> None:
    plain = advice(tmp_path, *QUESTION)
    found = advice(tmp_path, *QUESTION, "--physical-experts", "288", "--shared-experts", "1")
    assert (found["num_experts"], found["physical_experts"], found["bound"]) == (256, 288, 2048)
    assert found["seen"]["percentiles"]["50.0%"] > plain["seen"]["percentiles"]["50.0%"]
    table = tmp_path / "placement.json"
    table.write_text(json.dumps([*range(256), *range(32)]))
    assert (
        advice(tmp_path, *QUESTION, "--placement", str(table))["chance_limit"]
        == advice(tmp_path, *QUESTION, "--physical-experts", "288")["chance_limit"]
    )


def test_tuned_times_of_a_table_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuned.csv"
    rows = {1024: 300.0, 2048: 500.0, 4096: 900.0}
    path.write_text(TABLE_HEAD + "".join(TABLE_ROW.format(bucket=bucket, us=us) for bucket, us in rows.items()))
    found = advice(tmp_path, *QUESTION, "--kernel-table", str(path), "--cu-count", "256")
    assert [one["us"] for one in (found["whole_buffer"], of(found, "smallest proven"))] == [900, 500]
    out = capsys.readouterr().out
    assert "Tuned time 500.0 us, 900.0 us with 4096 rows." in out
    assert "Smaller, 1024, is NOT PROVEN: no drawn step exceeds it" in out
    assert out.rstrip().endswith("Tuned time 300.0 us, 500.0 us with 2048 rows.")


def test_no_limit_is_recommended_by_chance_where_the_histograms_drift(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loads = tmp_path / "loads.json"
    steps = [[[100 + 90 * (expert % 16 == step % 16) for expert in range(256)]] for step in range(16)]
    loads.write_text(json.dumps(steps))
    found = advice(tmp_path, *QUESTION, "--histogram", str(loads), "--limit", "1536")
    out = capsys.readouterr().out
    assert found["drift"]
    assert "No smaller limit by chance: the model does not hold, the loads of layer 0 drift" in out
    assert "Yours, 1536, is NOT PROVEN: no drawn step exceeds it, and the model of its chance does not hold" in out


def test_nothing_unproven_is_recommended_without_saying_so(tmp_path: Path) -> None:
    for limit in ("900", "1100", "2047"):
        found = advice(tmp_path, *QUESTION, "--limit", limit)
        bound = found["bound"]
        assert all(f"={bound} is proven" in line or "NOT PROVEN" in line for line in found["recommendation"])


@pytest.mark.parametrize(
    ("held", "slots"),
    [
        ((), (0, 0)),
        (("--physical-experts=20",), (20, 0)),
        (("--physical-experts=32", "--shared-experts=2"), (32, 2)),
        (("--num-experts=6", "--topk=2", "--placement=0,1,2,3,4,5,5,5", "--shared-experts=1"), (8, 1)),
    ],
)
def test_case_files_are_cases_whose_fullest_rank_receives_the_bound(
    tmp_path: Path, held: tuple[str, ...], slots: tuple[int, int]
) -> None:
    folder = tmp_path / "cases"
    advice(tmp_path, "--model=tiny", "--ep-size=4", "--tokens=5", "--limit=9", f"--cases={folder}", *held)
    limits = {}
    for path in folder.iterdir():
        case = resolve_case([load_case_file(str(path))], 4).case
        workload = workload_for(case, torch.device("cpu"))
        ids = torch.cat([workload.routing_of(rank, 5) for rank in range(4)])
        rows = recv_counts(ids, case.experts_per_rank, 4).tolist()
        limits[path.stem] = resolve_limit(case.limit, Traffic(case.tokens, tuple(rows), case.capacity))
        assert (max(rows), (case.physical_experts, case.shared_experts)) == (20, slots)
    assert limits == {"proven": 20, "one-less": 19, "yours": 9}


def test_case_files_replace_links_and_name_their_folder_as_a_shell_reads_it(tmp_path: Path) -> None:
    folder, other = tmp_path / "a b\nlimit = 1", tmp_path / "other"
    folder.mkdir()
    other.write_text("kept")
    (folder / "proven.toml").symlink_to(other)
    assert main(["advise", "-q", "--model=tiny", "--ep-size=2", "--tokens=4", f"--cases={folder}"]) == 0
    assert other.read_text() == "kept"
    text = (folder / "proven.toml").read_text()
    assert msgspec.toml.decode(text)["limit"] == 8
    assert "a b\\nlimit = 1/proven.toml' -n 2" in text


def test_limit_of_the_environment_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MORI_MOE_MAX_INPUT_TOKENS", "1500")
    assert of(advice(tmp_path, *QUESTION), "yours")["limit"] == 1500


def test_without_tokens_a_rank_may_have_all_that_mori_takes(tmp_path: Path) -> None:
    found = advice(tmp_path, "--model=tiny", "--ep-size=2", "--max-dispatch-tokens-per-rank=8", "--steps=5")
    assert (found["bound"], found["capacity"]) == (16, 16)
    assert found["recommendation"][0].startswith("SGLANG_MORI_MOE_MAX_INPUT_TOKENS=0 (off): ")


def test_limit_that_is_off_is_judged_as_the_whole_buffer_and_other_programs_have_no_variable_of_sglang(
    tmp_path: Path,
) -> None:
    for limit in ("off", "0", "capacity", "99999999"):
        said = advice(tmp_path, *QUESTION, f"--limit={limit}")["recommendation"][1]
        assert said == "Yours cuts nothing: it is off, or at least the 4096 rows of the receive buffer."
    found = advice(tmp_path, *QUESTION, "--profile=vllm")
    assert found["recommendation"][0].startswith("limit=")


def test_chance_too_small_for_a_float_is_not_called_impossible(tmp_path: Path) -> None:
    found = advice(tmp_path, "--model=gpt-oss-120b", "--ep-size=128", "--steps=1", "--limit=131071")
    assert "a step does with a chance of below 1e-300" in found["recommendation"][1]


def test_smaller_buffer_than_the_steps_is_an_overflow_whatever_the_limit(tmp_path: Path) -> None:
    folder = tmp_path / "cases"
    found = advice(tmp_path, *QUESTION, "--prealloc-max-recv-tokens=512", "--limit=512", f"--cases={folder}")
    assert found["recommendation"][0].startswith("OVERFLOW, whatever the limit: a rank may receive 2048 rows")
    assert found["recommendation"][1].startswith("Yours cuts nothing: it is off, or at least the 512 rows")
    assert of(found, "yours")["chance_independent"] == of(found, "yours")["chance_any"] == 1
    assert {path.read_text().partition("all of them: ")[2][:8] for path in folder.iterdir()} == {"OVERFLOW"}
    assert found["notes"][-1].startswith("OVERFLOW, whatever the limit: 10000 drawn steps exceed the receive buffer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--num-experts=513", "--ep-size=8"),
            "513: not divisible by 8 ranks; .*experts 512 --shared-experts 1 if 1 .*, or --physical-experts 520 if",
        ),
        (("--physical-experts=300",), "physical_experts = 300: 16 ranks share the slots evenly"),
        (("--physical-experts=128",), "a multiple of 16 from 256 to 131072"),
        (("--tokens=300",), "tokens = 300: above max_dispatch_tokens_per_rank = 256"),
        (("--tokens=1,2",), "2 numbers for 16 ranks"),
        (("--topk=300",), "topk = 300"),
        (("--limit=max-recv",), "the rows received|rows received are not known before a run"),
        (("--nodes=3",), "--nodes 3: does not divide 16 ranks"),
        (("--routing=hot-rank:16",), "R is allowed from 0 to 15"),
        (("--placement=none.json",), "placement = 'none.json': cannot be read"),
        (("--batches=x",), "--batches 'x': allowed are"),
        (("--histogram=none.npy",), "--histogram 'none.npy': cannot be read"),
        (("--cases=/dev/null/x",), "--cases '/dev/null/x': cannot be written"),
        (("--json=/dev/null/x",), "--json '/dev/null/x': cannot be written"),
        (("--chance=2",), "allowed are numbers between 0 and 1"),
        (("--ep-size=0",), "allowed are whole numbers"),
    ],
)
def test_question_that_makes_no_sense_is_refused_with_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["advise", *QUESTION, *arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    assert re.search(message, capsys.readouterr().err)


def test_measured_times_stand_beside_the_limits_and_say_what_is_emulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = ("--model=tiny", "--ep-size=2", "--tokens=8", "--limit=5", "--iterations=2", "--warmup=1")
    folders = (f"--json={tmp_path / 'advice.json'}", f"--out={tmp_path / 'out'}")
    assert main(["advise", *layer, "--measure", *folders]) == 0
    told = capsys.readouterr().out
    assert "layer us: measured for 16 tokens by uniform, median of the slowest rank (emulated: collective" in told
    assert "no figure of a device" in told
    found = json.loads((tmp_path / "advice.json").read_text())
    yours, proven = of(found, "yours"), of(found, "smallest proven")
    assert (yours["layer_us"], yours["verdict"]) == (None, "UNDER_LIMIT (emulated)")
    for one in (proven, found["whole_buffer"]):
        assert one["layer_us"] >= one["experts_us"] > 0
        assert one["verdict"] == "PASS (emulated)"


def test_advice_stands_where_nothing_can_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("--model=tiny", "--ep-size=2", "--tokens=8")
    assert main(["advise", "-q", *layer, "--measure", "--iterations=0", f"--out={tmp_path / 'out'}"]) == 77
    shown = capsys.readouterr()
    assert "=16 is proven" in shown.out
    assert "--measure: no limit has a time, the runs ended PASS" in shown.err


def test_advice_stands_where_its_measurement_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise Interrupted(2)

    monkeypatch.setattr("distbench.tools.advise.measured.measured", interrupted)
    out = tmp_path / "advice.json"
    asked = ["advise", "-q", "--model=tiny", "--ep-size=2", "--tokens=8", "--measure", f"--json={out}"]
    assert main([*asked, f"--out={tmp_path / 'out'}"]) == 130
    shown = capsys.readouterr()
    assert "MAX_INPUT_TOKENS=16 is proven" in " ".join(shown.out.split())
    assert "INTERRUPTED: ended by SIGINT" in " ".join(shown.err.split())
    assert json.loads(out.read_text())["bound"] == 16


def test_options_of_a_run_are_refused_without_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--model=tiny", "--ep-size=2", "--device=cpu"]) == 2
    assert "--device: for runs that --measure starts" in capsys.readouterr().err


def test_page_shows_the_distribution_with_what_is_proven_seen_and_left_to_chance(tmp_path: Path) -> None:
    page, path = tmp_path / "advice.html", tmp_path / "advice.json"
    assert main(["advise", "-q", *QUESTION, "--limit=912", f"--html={page}", f"--json={path}"]) == 0
    found, shown = json.loads(path.read_text()), words(read_page(page))
    seen = found["seen"]
    assert len(seen["quantiles"]) == 101
    assert seen["quantiles"] == sorted(seen["quantiles"])
    assert (seen["quantiles"][99], seen["quantiles"][100]) == (seen["percentiles"]["99.0%"], seen["most"])
    for line in (*found["recommendation"], *found["proof"]):
        assert line in shown
    labels = (f"proven {found['bound']}", f"fullest seen {seen['most']}", "limit asked for 912")
    for label in (*labels, f"chance 1.0e-09 {found['chance_limit']}"):
        assert label in shown
    drawing = read_page(page).xpath("//svg/path[@class='above']/@d")[0]
    assert drawing.count("M") == sum(rows > 912 for rows in seen["quantiles"])


def test_page_that_cannot_be_written_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "-q", "--model=tiny", "--ep-size=2", "--html=/dev/null/a.html"]) == 2
    told = capsys.readouterr().err
    assert "--html '/dev/null/a.html': cannot be written" in told
    assert "name another file" in told
    assert main(["advise", "-q", "--model=tiny", "--ep-size=2", "--html=/dev/null/a", "--json=/dev/null/a"]) == 2
    assert "name two files" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--html", "--cases"])
def test_full_disk_is_named_as_one(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Path, __: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")

    monkeypatch.setattr("distbench.report.files.os.replace", full)
    assert main(["advise", "-q", *QUESTION, option, str(tmp_path / "out")]) == 3
    assert "DISK_FULL: out: No space left on device; free some space" in capsys.readouterr().err
