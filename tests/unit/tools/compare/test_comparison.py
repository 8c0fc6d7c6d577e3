"""Findings and exit codes of `distbench compare`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.cli.main import main
from tests.results import result, timing, write_results

EXPECTED: dict[str, Any] = {"as_expected": True, "expect": "UNDER_LIMIT"}

CASE = result()["case"] | {"hash": "other"}
SHAPE = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "topk": 2}


def noisy(seed: int, scale: float = 1.0, size: int = 30) -> dict[str, Any]:
    samples = 100 * np.exp(np.random.default_rng(seed).normal(0, 0.05, size))
    return timing(scale, samples.tolist()) | {"wall_s": 0.25}


def compare(tmp_path: Path, old: list[dict[str, Any]], new: list[dict[str, Any]], *more: str) -> tuple[int, Any]:
    folders = [str(write_results(tmp_path / name, reports)) for name, reports in (("old", old), ("new", new))]
    path = tmp_path / "comparison.json"
    code = main(["compare", *folders, "--json", str(path), *more])
    return code, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(
    ("old", "new", "kind", "code"),
    [
        (result(), result(), None, 0),
        (result(), result(verdict="CORRUPT"), "regressed", 1),
        (result(), result(verdict="UNSUPPORTED"), "regressed", 1),
        (result(), result(verdict="UNDER_LIMIT", **EXPECTED), "regressed", 1),
        (result(verdict="UNDER_LIMIT", **EXPECTED), result(verdict="UNDER_LIMIT", **EXPECTED), None, 0),
        (result(verdict="UNDER_LIMIT", **EXPECTED), result(as_expected=False, expect="UNDER_LIMIT"), "regressed", 1),
        (result(verdict="CORRUPT"), result(verdict="CORRUPT"), "still failing", 0),
        (result(verdict="CORRUPT"), result(verdict="HANG"), "regressed", 1),
        (result(verdict="HANG"), result(verdict="CORRUPT"), "still failing", 0),
        (result(verdict="HANG"), result(verdict="HANG"), "no result", 77),
        (result(verdict="HANG"), result(verdict="RANK_FAULT"), "no result", 77),
        (result(verdict="UNSUPPORTED"), result(verdict="UNSUPPORTED"), "no result", 77),
        (result(verdict="INVALID", as_expected=True), result(verdict="INVALID", as_expected=True), None, 0),
        (result(verdict="CORRUPT"), result(), "fixed", 0),
        (result(), result(case=CASE | {"model": "other"}), "another case", 1),
        (result(case=CASE | SHAPE), result(case=CASE | SHAPE | {"model": "custom"}), None, 0),
        (result(case=CASE | SHAPE), result(case=CASE | SHAPE | {"model": "custom", "topk": 9}), "another case", 1),
        (result(), result(case=CASE | {"repeats": 1, "policy": "strict"}), None, 0),
        (result(), result(case=CASE | {"repeats": 2}), "another case", 1),
        (result(), result(case=CASE | {"no key of today": 1}), "another case", 1),
    ],
)
def test_change_of_verdict_gives_its_kind_and_exit_code(
    tmp_path: Path, old: dict[str, Any], new: dict[str, Any], kind: str | None, code: int
) -> None:
    found, comparison = compare(tmp_path, [old], [new], "--verdicts-only")
    assert found == comparison["exit_code"] == code
    assert [one["kind"] for one in comparison["cases"]] == ([kind] if kind else [])


def test_missing_case_fails_the_comparison_and_a_new_case_is_judged_alone(tmp_path: Path) -> None:
    both = result("both")
    assert compare(tmp_path, [both, result("gone")], [both], "--verdicts-only")[0] == 1
    assert compare(tmp_path, [both], [both, result("new")], "--verdicts-only")[0] == 0
    code, comparison = compare(tmp_path, [both], [both, result("new", "CORRUPT")], "--verdicts-only")
    assert (code, comparison["cases"][0]["kind"]) == (1, "new failure")


def test_unchanged_times_pass_and_all_stages_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, comparison = compare(tmp_path, [result(timing=noisy(1))], [result(timing=noisy(2))])
    assert (code, comparison["unjudged"]) == (0, [])
    assert len(comparison["times"]) == 16
    assert all(0 < one["change"]["detectable"] < 0.2 for one in comparison["times"])
    assert "90% of slowdowns of +" in capsys.readouterr().out


def test_stage_that_became_slower_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = noisy(2)
    slow["truncated"] = slow["truncated"] | {"experts": noisy(2, 1.5)["padded"]["experts"]}
    code, comparison = compare(tmp_path, [result(timing=noisy(1))], [result(timing=slow)])
    slower = [(one["arm"], one["stage"]) for one in comparison["times"] if one["change"]["slower"]]
    assert (code, slower) == (1, [("truncated", "experts")])
    assert re.search(
        r"slower +truncated/experts, all cases: [\d.]+ → [\d.]+ µs, \+[45]\d\.\d%; 90% of ", capsys.readouterr().out
    )
    assert compare(tmp_path, [result(timing=noisy(1))], [result(timing=slow)], "--verdicts-only")[0] == 0
    assert compare(tmp_path, [result(timing=slow)], [result(timing=noisy(1))])[0] == 0


def test_one_slower_case_among_many_is_named(tmp_path: Path) -> None:
    old = [result(f"case {seed}", timing=noisy(seed)) for seed in range(20)]
    new = [result(f"case {seed}", timing=noisy(seed + 100, 3.0 if seed == 7 else 1.0)) for seed in range(20)]
    code, comparison = compare(tmp_path, old, new)
    assert code == 1
    assert {one["case"] for one in comparison["times"] if one["change"]["slower"]} - {""} == {"case 7"}


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (noisy(1), noisy(2, size=3), 1),
        (noisy(1), noisy(2) | {"truncated": noisy(2, size=9)["truncated"]}, 1),
        (noisy(1, size=9), noisy(2), 77),
        (noisy(1) | {"truncated": noisy(1, size=9)["truncated"]}, noisy(2), 77),
        (noisy(1) | {"padded": noisy(1, size=1)["padded"]}, noisy(2), 0),
        ({"wall_s": 1.0}, noisy(1), 77),
        ({"wall_s": 1.0}, {"wall_s": 1.0}, 77),
        (noisy(1, size=3), noisy(2, size=3), 77),
        (timing(samples=[1.0]) | {"wall_s": 1.0}, timing(samples=[1.0]) | {"wall_s": 1.0}, 77),
        (noisy(1), {"wall_s": 1.0}, 1),
        (noisy(1), noisy(1) | {"truncated": {}}, 1),
        (noisy(1), noisy(1) | {"truncated": {"experts": {"median_us": 1.0}}}, 1),
        (noisy(1), noisy(1) | {"truncated": {"experts": {"median_us": None}}}, 2),
        (noisy(1), noisy(1) | {"truncated": {"experts": {"median_us": 1.0, "samples_us": [-1.0]}}}, 2),
    ],
)
def test_missing_short_or_unreadable_times_give_their_exit_code(
    tmp_path: Path, old: dict[str, Any], new: dict[str, Any], code: int
) -> None:
    assert compare(tmp_path, [result(timing=old)], [result(timing=new)])[0] == code


def test_comparison_of_untimed_results_is_reported_and_exits_77(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untimed = [result(timing={"wall_s": 1.0})]
    code, comparison = compare(tmp_path, untimed, untimed)
    assert (code, comparison["untimed"]) == (77, True)
    assert "no times compared: " in capsys.readouterr().out
    code, comparison = compare(tmp_path, untimed, untimed, "--verdicts-only")
    assert (code, comparison["untimed"]) == (0, False)
    assert "no times compared" not in capsys.readouterr().out


def several(tmp_path: Path, new: list[dict[str, Any]], *more: str, old: int = 5) -> tuple[int, Any]:
    """Compare with launches whose levels are up to 10 % apart."""
    folders = [
        str(write_results(tmp_path / f"old{number}", [result(timing=noisy(number, 1 + number / 10 / old))]))
        for number in range(old)
    ]
    path = tmp_path / "comparison.json"
    code = main(["compare", *folders, str(write_results(tmp_path / "new", new)), "--json", str(path), *more])
    return code, json.loads(path.read_text()) if path.exists() else None


def test_several_old_launches_give_the_spread_between_launches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    another = [result(timing=noisy(99, 1.15))]
    assert compare(tmp_path, [result(timing=noisy(1))], another)[0] == 1
    assert "noise: within launches only" in capsys.readouterr().out
    code, comparison = several(tmp_path, another)
    assert (code, comparison["launches"], comparison["noise"]) == (0, 5, "between launches")
    told = capsys.readouterr().out
    assert "noise: between the 5 launches of OLD" in told
    assert re.search(r"launches lie [2-5]\.\d% apart", told)
    assert several(tmp_path, [result(timing=noisy(99, 3.0))])[0] == 1


def test_exactly_two_old_launches_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert several(tmp_path, [result(timing=noisy(9))], old=2)[0] == 2
    assert "give one, or at least 3" in capsys.readouterr().err


def test_case_missing_in_one_old_launch_is_excluded_from_times_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [result("a", timing=noisy(1)), result("b", timing=noisy(2))]
    folders = [str(write_results(tmp_path / f"old{number}", cases[: 2 - (number == 1)])) for number in range(3)]
    new = str(write_results(tmp_path / "new", cases))
    assert main(["compare", *folders, new]) == 0
    assert "padded/experts in 1 case" in capsys.readouterr().out
    assert main(["compare", *folders, str(write_results(tmp_path / "short", cases[:1]))]) == 1


def test_case_that_failed_in_one_of_several_old_launches_has_to_pass(tmp_path: Path) -> None:
    folders = [
        str(write_results(tmp_path / f"old{number}", [result(verdict=verdict)]))
        for number, verdict in enumerate(["CORRUPT", "PASS", "PASS"])
    ]
    new = str(write_results(tmp_path / "new", [result(verdict="CORRUPT")]))
    assert main(["compare", *folders, new, "--verdicts-only"]) == 1


@pytest.mark.parametrize(("share", "code"), [("0.5", 0), ("0.001", 77), ("0", 2), ("nan", 2), ("-1", 2)])
def test_comparison_that_cannot_detect_the_requested_shift_exits_77(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str, code: int
) -> None:
    found, comparison = compare(tmp_path, [result(timing=noisy(1))], [result(timing=noisy(2))], "--detect", share)
    assert found == code
    if code == 77:
        assert ["padded", "experts"] in comparison["coarse"]
        assert "too much noise to find as little as --detect 0.001: control/combine" in capsys.readouterr().out


def test_detect_option_requires_that_every_arm_is_judged(tmp_path: Path) -> None:
    thin = noisy(1) | {"padded": noisy(1, size=3)["padded"]}
    for more, code in (((), 0), (("--detect", "0.5"), 77)):
        found, comparison = compare(tmp_path, [result(timing=thin)], [result(timing=noisy(2))], *more)
        assert found == code
        assert ["padded", "experts"] in comparison["unjudged"]


def test_last_line_counts_stages_that_are_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thin = noisy(1) | {"padded": noisy(1, size=3)["padded"]}
    compare(tmp_path, [result(timing=thin)], [result(timing=noisy(2))])
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "exit 0, nothing became worse: 1 case compared, 4 arms and stages not judged"
    )


def test_checked_passes_are_not_compared_if_timed_iterations_exist(tmp_path: Path) -> None:
    def timed(seed: int, scale: float = 1.0) -> dict[str, Any]:
        once, found = timing(samples=[float(seed)]), noisy(seed, scale, size=200)
        for arm in ("padded", "truncated"):
            once[arm] = {stage: figures | {"median_error": 0.01} for stage, figures in found[arm].items()}
        return result(timing=once | {"wall_s": 1.0}, **DEVICE)

    code, comparison = compare(tmp_path, [timed(1)], [timed(2)])
    assert (code, comparison["unjudged"]) == (0, [])
    assert {time["arm"] for time in comparison["times"]} == {"padded", "truncated"}
    assert compare(tmp_path, [timed(1)], [timed(2, 1.5)])[0] == 1


DEVICE: dict[str, Any] = {"method": {"clock": "device events"}}


def test_tenfold_slowdown_never_passes_whatever_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launches = [
        str(write_results(tmp_path / f"old{number}", [result(timing=noisy(number, scale))]))
        for number, scale in enumerate((1.0, 1.3, 0.7))
    ]
    new = str(write_results(tmp_path / "new", [result(timing=noisy(9, 10.0))]))
    for more in ((), ("--detect", "off")):
        assert main(["compare", *launches, new, *more]) == 77
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("not judged: control/combine, ")
        assert "not even a tenfold slowdown would have been detected" in lines[0]
        assert lines[1].startswith("suspect: far slower, but ")
        assert any(line.startswith("suspect        padded/experts, all cases: ") for line in lines)


def test_tenfold_slowdown_of_one_case_in_many_never_passes(tmp_path: Path) -> None:
    old = [result(f"case {seed}", timing=noisy(seed, size=10)) for seed in range(40)]
    new = [result(f"case {seed}", timing=noisy(seed + 100, 10.0 if seed == 7 else 1.0, size=10)) for seed in range(40)]
    code, comparison = compare(tmp_path, old, new)
    assert code == 77
    assert {case for _, _, case in comparison["suspect"]} == {"case 7"}


def test_device_times_too_noisy_to_detect_ten_percent_do_not_pass_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = [100 * np.exp(np.random.default_rng(seed).normal(0, 0.4, 30)) for seed in range(2)]
    old, new = (result(timing=timing(samples=samples.tolist()) | {"wall_s": 1.0}) for samples in wide)
    assert compare(tmp_path, [old], [new])[0] == 0
    code, comparison = compare(tmp_path, [old | DEVICE], [new | DEVICE])
    assert (code, comparison["detect"]) == (77, 0.1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("exit 77")
    code, comparison = compare(tmp_path, [old | DEVICE], [new | DEVICE], "--detect", "off")
    assert (code, comparison["detect"], comparison["coarse"]) == (0, None, [])
    narrow = [result(timing=noisy(seed, size=200), **DEVICE) for seed in (1, 2)]
    code, comparison = compare(tmp_path, narrow[:1], narrow[1:])
    assert (code, comparison["detect"], comparison["coarse"]) == (0, 0.1, [])


def test_environment_differences_are_printed_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def environment(torch: str, **more: str) -> dict[str, Any]:
        versions = {"torch": torch, "python": "3.12.3"}
        return {"hosts": ["a"], "devices": ["cpu"], "versions": versions, "commits": {}, "variables": more}

    old, new = environment("2.13.0"), environment("2.9.0+rocm7.0", NCCL_ALGO="Ring")
    slow = [result(timing=noisy(1, scale), environment=one) for scale, one in ((1.0, old), (2.0, new))]
    code, comparison = compare(tmp_path, slow[:1], slow[1:])
    assert (code, comparison["environment"]) == (
        1,
        [
            {"what": "versions.torch", "old": ["2.13.0"], "new": ["2.9.0+rocm7.0"]},
            {"what": "variables.NCCL_ALGO", "old": [], "new": ["Ring"]},
        ],
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "environment    versions.torch: 2.13.0 → 2.9.0+rocm7.0",
        "environment    variables.NCCL_ALGO: none → Ring",
    ]
    assert lines[-1] == "exit 1, something became worse: 1 case compared, 2 differences of the environment"
    assert compare(tmp_path, slow[:1], slow[:1])[1]["environment"] == []


def test_old_and_new_microseconds_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laps = np.random.default_rng(1).permutation(np.arange(10.0, 41.0)).tolist()
    old, new = ([result(name, timing=timing(scale, laps) | {"wall_s": 1.0}) for name in "ab"] for scale in (1.0, 3.0))
    code, comparison = compare(tmp_path, old, new)
    (found,) = (
        one for one in comparison["times"] if (one["arm"], one["stage"], one["case"]) == ("padded", "experts", "")
    )
    assert (code, found["old_us"], found["new_us"], found["cases"]) == (1, 50.0, 150.0, 2)
    assert "padded/experts, all cases: 50.0 → 150.0 µs summed over 2 cases, +" in capsys.readouterr().out


def test_comparison_in_json_is_the_only_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write_results(tmp_path / name, [result()])) for name in ("old", "new")]
    assert main(["compare", *folders, "--json", "-", "--verdicts-only"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["schema"] == "distbench.compare/1"
    assert told.err.splitlines()[-1].startswith("exit 0, nothing became worse: 1 case compared")
    assert not list(tmp_path.glob("**/-"))


def test_missing_results_are_refused_by_compare(tmp_path: Path) -> None:
    assert compare(tmp_path, [], [])[0] == 2
    assert compare(tmp_path, [result("a")], [result("b")])[0] == 2
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "nowhere")]) == 2


def test_quiet_comparison_prints_what_changed_and_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = noisy(2) | {"padded": noisy(2, scale=2.0)["padded"]}
    compare(tmp_path, [result(timing=noisy(1))], [result(timing=slow)], "--quiet")
    told = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in told[:-1]} == {"slower"}
    assert told[-1].startswith("exit 1, something became worse: ")
    gone = [result("here"), *(result(f"gone-{number}") for number in range(60))]
    for flags, shown in (((), False), (("-v",), True)):
        compare(tmp_path, gone, [result("here")], "--verdicts-only", *flags)
        text = capsys.readouterr().out
        assert ("gone-59" in text) == shown
        assert ("and 10 cases more (-v has all)" in text) != shown
