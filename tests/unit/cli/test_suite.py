"""`distbench suite` and `run` with fake launches: kept results, refusals and judgements."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from distbench.case.entry import Entry
from distbench.case.identity import case_hash
from distbench.cli import launching
from distbench.cli import torchrun_rank as rank_command
from distbench.cli.main import main
from distbench.errors import Verdict
from distbench.launcher import campaign, preflight
from distbench.launcher.job import Job
from distbench.launcher.postmortem import LaunchFailure
from distbench.report import console
from distbench.report.document import build_report
from distbench.report.environment import Environment
from distbench.report.journal import RESULTS, Journal
from distbench.report.sink import Sink
from distbench.utils.signals import Interrupted
from distbench.verify.records import Judgement, Outcome, Reason
from tests.cases import tiny_case
from tests.end_to_end.launches import write_suite
from tests.results import result

# Keys of a case that is refused before any rank starts, and the message.
UNFIT: list[tuple[dict[str, Any], int, str]] = [
    ({"experts": "aiter", "emulate": True, "hidden_size": 9}, 2, "hidden_size = 9: aiter takes bf16 weights in "),
    ({"experts": "aiter", "emulate": True, "intermediate_size": 32}, 2, "intermediate_size = 32: aiter takes bf16"),
    ({"experts": "triton", "hidden_size": 12, "device": "cpu"}, 77, "experts triton: hidden_size = 12: rows of 24 "),
    ({"tokens": 0, "limit": "max-recv"}, 2, "limit = max-recv: comes out as 0 rows"),
]
NOWHERE = Environment(hosts=[], devices=[], versions={}, commits={}, variables={})
Ranks = Callable[..., list[list[str]]]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Setter of the verdict of each case by its seed (default: PASS); it returns the case names of each launch."""

    def ending(verdicts: dict[int, Verdict]) -> list[list[str]]:
        launches: list[list[str]] = []

        def supervise(job: Job, *_: Any) -> None:
            launches.append([entry.name for entry in job.entries])
            journal = Journal(Path(job.out), job.report_paths)
            for number, entry in enumerate(job.entries):
                outcome = Outcome(entry.case, Judgement(verdicts.get(entry.case.seed, Verdict.PASS), [], None))
                report = build_report(entry, outcome, environment=NOWHERE, wall_s=len(launches) + number / 8)
                journal.append(report)
            journal.close()

        monkeypatch.setattr(campaign, "supervise", supervise)
        return launches

    monkeypatch.setattr(launching, "preload_ranks", lambda: None)
    for module in (launching, preflight):
        monkeypatch.setattr(module, "count_devices", lambda: 0)
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    monkeypatch.setattr(console, "print_report", lambda _: None)  # a fake launch has no comparisons
    return ending


@pytest.mark.parametrize(("experts", "code"), [("reference", 1), ("triton", 0)])
def test_expectation_that_depends_on_the_kernel_is_derived_from_it(
    tmp_path: Path, ranks: Ranks, experts: str, code: int
) -> None:
    """All cases end in PASS, as with an ordered kernel; from an atomic kernel PASS is not expected."""
    ranks({})
    chosen = ("--select=name~gaussian atomic", f"--experts={experts}", "--device=cpu")
    assert main(["suite", "smoke", "--nproc=2", "--out", str(tmp_path), *chosen]) == code


@pytest.mark.parametrize("unfit", UNFIT, ids=lambda unfit: unfit[2][:30])
def test_suite_with_a_shape_that_a_case_refuses_is_refused_before_a_rank_starts(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str], unfit: tuple[dict[str, Any], int, str]
) -> None:
    keys, code, told = unfit
    launches = ranks({})
    cases = [{"name": "sound"}, {"name": "odd", **keys}]
    suite = tmp_path / "suite.json"
    suite.write_text(json.dumps({"defaults": {"model": "tiny", "tokens": 3, "numerics": "gaussian"}, "include": cases}))
    assert main(["suite", str(suite), "--nproc", "2", "--out", str(tmp_path / "out")]) == code
    assert f"{suite}: case odd: {told}" in capsys.readouterr().err
    assert launches == []


def suite(out: Path, file: Path | str, *arguments: str) -> int:
    return main(["suite", str(file), "--nproc=2", "--quiet", f"--out={out}", *arguments])


def lines(out: Path) -> dict[str, bytes]:
    found = {json.loads(line)["name"]: line for line in (out / RESULTS).read_bytes().splitlines()}
    assert len(found) == len((out / RESULTS).read_bytes().splitlines())
    return found


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.fixture
def no_ranks(ranks: Ranks) -> None:
    """Use fake launches in which every case passes."""
    ranks({})


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    return write_suite(tmp_path / "suite.json", range(4))


@pytest.mark.parametrize(
    ("arguments", "again"),
    [
        ((), set()),
        (("--select=seed=0",), set()),
        (("--rerun=all",), {"seed=0", "seed=1", "seed=2", "seed=3"}),
        (("--rerun=all", "--select=seed=0"), {"seed=0"}),
        (("--rerun=failed",), {"seed=1", "seed=2"}),
        (("--rerun=failed", "--select=seed=1"), {"seed=1"}),
        (("--rerun=failed", "--select=seed=0"), set()),
    ],
)
def test_only_results_of_selected_cases_are_replaced(
    tmp_path: Path, ranks: Ranks, seeds: Path, arguments: tuple[str, ...], again: set[str]
) -> None:
    launches = ranks({1: Verdict.CORRUPT, 2: Verdict.DRIFT})
    out = tmp_path / "out"
    assert suite(out, seeds) == 1
    first = lines(out)
    suite(out, seeds, *arguments)
    assert changed(first, lines(out)) == again
    assert launches[1:] == ([sorted(again)] if again else [])


def test_unreadable_results_are_moved_aside_by_rerun_all(tmp_path: Path, ranks: Ranks, seeds: Path) -> None:
    ranks({})
    out = tmp_path / "out"
    suite(out, seeds)
    first = lines(out)
    with (out / RESULTS).open("ab") as file:
        file.write(b'{"old":1}\n{"torn')
    assert suite(out, seeds) == 2
    assert suite(out, seeds, "--rerun=all", "--select=seed=3") == 0
    assert changed(first, lines(out)) == {"seed=3"}
    assert (out / "results.damaged.jsonl").read_bytes() == b'{"old":1}\n'


@pytest.mark.parametrize("arguments", [("run", "--model=tiny"), ("suite", "seeds", "--rerun=all", "--select=seed=0")])
def test_baseline_in_the_output_folder_is_read_before_it_is_overwritten(
    tmp_path: Path, ranks: Ranks, seeds: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    command = [str(seeds) if word == "seeds" else word for word in arguments]
    command += ["--nproc=2", f"--out={out}", "--verdicts-only"]
    ranks({})
    assert main(command) == 0
    ranks({0: Verdict.CORRUPT})
    assert main([*command, f"--baseline={out}", "--report=html"]) == 1
    assert ": PASS → CORRUPT" in capsys.readouterr().out
    assert "1 case compared with one older launch, 1 regressed" in (out / "comparison.html").read_text()


def expectation(verdict: str, **match: object) -> list[dict[str, object]]:
    return [{"verdict": verdict, "match": match}]


def test_finished_cases_are_judged_by_the_current_expectation(tmp_path: Path, ranks: Ranks, seeds: Path) -> None:
    launches = ranks({1: Verdict.CORRUPT})
    out = tmp_path / "out"
    write_suite(seeds, range(3), expect=expectation("DRIFT", seed=1))
    assert suite(out, seeds) == 1
    before = lines(out)

    write_suite(seeds, range(3), expect=expectation("CORRUPT", seed=1))
    assert suite(out, seeds, "--report=json") == 0
    after = lines(out)
    assert changed(before, after) == {"seed=1"}
    told = json.loads(after["seed=1"])
    assert (told["verdict"], told["expect"], told["as_expected"]) == ("CORRUPT", "CORRUPT", True)
    assert told == json.loads(before["seed=1"]) | {"expect": "CORRUPT", "as_expected": True}
    assert main(["report", str(out), "--report=md"]) == 0

    write_suite(seeds, range(3), expect=expectation("CORRUPT", seed=0))
    assert suite(out, seeds, "--rerun=failed") == 1
    assert launches[1:] == [["seed=0", "seed=1"]]


def test_run_refuses_the_folder_of_a_suite(
    tmp_path: Path, ranks: Ranks, seeds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks({5: Verdict.DRIFT, 6: Verdict.DRIFT})
    out = tmp_path / "out"
    suite(out, seeds)
    kept, summary = (out / RESULTS).read_bytes(), (out / "summary.json").read_bytes()
    capsys.readouterr()
    run = ["run", "--model=tiny", "--nproc=2"]
    assert main([*run, f"--out={out}"]) == 2
    refused = (
        "holds 4 results of something else (suite, seed=0), which this would replace; name another folder with --out"
    )
    assert capsys.readouterr().err == f"distbench: INVALID: folder {out}: {refused}\n"
    assert ((out / RESULTS).read_bytes(), (out / "summary.json").read_bytes()) == (kept, summary)

    other = tmp_path / "other"
    assert [main([*run, f"--out={other}", f"--seed={seed}"]) for seed in (5, 5, 6)] == [1, 1, 1]
    assert lines(other).keys() == {"run"}
    with (other / RESULTS).open("ab") as file:
        file.write(b"{}\n")
    assert main([*run, f"--out={other}"]) == 2
    assert "holds results that cannot be read" in capsys.readouterr().err


def sweep(out: Path, *arguments: str) -> int:
    return main(["sweep", "--limits=max-recv", "--model=tiny", "--nproc=2", f"--out={out}", *arguments])


def test_results_of_one_command_are_not_mixed_with_those_of_another(
    tmp_path: Path, ranks: Ranks, seeds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks({7: Verdict.CORRUPT})
    monkeypatch.setattr(console, "print_sweep", lambda *_: None)
    other = write_suite(tmp_path / "other.json", range(2))
    commands: dict[str, Callable[[Path], int]] = {
        "distbench run": lambda out: main(["run", "--model=tiny", "--nproc=2", f"--out={out}", "--seed=7"]),
        "suite": lambda out: suite(out, seeds),
        "other": lambda out: suite(out, other),
        "distbench sweep": sweep,
    }
    for name, command in commands.items():
        out = tmp_path / name
        code = command(out)
        assert code == (name == "distbench run")
        kept = (out / RESULTS).read_bytes()
        for another, refused in commands.items():
            if another != name:
                capsys.readouterr()
                assert refused(out) == 2
                assert f"of something else ({name}, " in capsys.readouterr().err
        assert (out / RESULTS).read_bytes() == kept
        assert main(["report", str(out), "--report=md"]) == code


@pytest.mark.parametrize("name", ["run", "trial 0123456789ab"])
def test_suite_refuses_the_folder_of_a_run(
    tmp_path: Path, ranks: Ranks, seeds: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks({})
    out = tmp_path / "out"
    out.mkdir()
    (out / RESULTS).write_text(json.dumps(result(name)) + "\n")
    assert suite(out, seeds) == 2
    assert f"something else ({name}), which this would mix" in capsys.readouterr().err
    (out / RESULTS).write_text(json.dumps(result("seed=0")) + "\n")
    assert suite(out, seeds) == 0


def test_report_exits_with_the_code_of_the_last_suite_with_or_without_select(
    tmp_path: Path, ranks: Ranks, seeds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks({1: Verdict.CORRUPT})
    out = tmp_path / "out"
    report = ["report", str(out), f"--report=junit={tmp_path}/junit.xml"]
    assert suite(out, seeds) == main(report) == 1
    assert suite(out, seeds, "--select=seed=0") == main(report) == 0
    assert "counts the 1 case that the last command there selected; --all counts" in capsys.readouterr().err
    assert main([*report, "--all"]) == 1
    (tmp_path / "fewer").mkdir()
    fewer = write_suite(tmp_path / "fewer" / "suite.json", [0, 2])
    assert suite(out, fewer) == main(report) == 0
    assert suite(out, seeds) == main(report) == 1


def test_report_in_json_is_the_only_standard_output(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks({})
    monkeypatch.setattr(console, "print_report", print)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--model=tiny", "--nproc=2", "--out=out", "--json", "-"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "Report(" in told.err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert main(["run", "--model=tiny", "--nproc=2", "--out=out", "--report=md=-"]) == 2
    assert "distbench report DIR --report" in capsys.readouterr().err


def test_merged_equal_cases_of_a_suite_are_reported(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks({})
    file = included(tmp_path / "twice.json", {"name": "first"}, {"name": "second"}, {"name": "third", "seed": 1})
    assert suite(tmp_path / "out", file) == 0
    told = f"distbench: {file}: 1 of 3 cases equal others and run once: second equals first"
    assert told in capsys.readouterr().err.splitlines()
    assert lines(tmp_path / "out").keys() == {"first", "third"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("no_ranks")
def test_signal_leaves_one_exit_code_and_no_false_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:

    def interrupted(*_: Any) -> None:
        raise Interrupted(number)

    monkeypatch.setattr(campaign, "supervise", interrupted)
    goes_on = "finished results are kept; the same command resumes"
    commands: dict[str, Callable[[Path], int]] = {
        "suite": lambda out: suite(out, seeds),
        "run": lambda out: main(["run", "--model=tiny", "--nproc=2", f"--out={out}"]),
    }
    for name, command in commands.items():
        out = tmp_path / name
        assert command(out) == 128 + number
        assert json.loads((out / "summary.json").read_text())["exit_code"] == 128 + number
        assert (goes_on in capsys.readouterr().err) == (name == "suite")
        (out / RESULTS).touch()
        assert main(["report", str(out), "--report=md"]) == 128 + number


def test_rank_lost_after_its_case_has_passed_gives_a_nonzero_exit_code(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks({})
    passing = cast("Callable[[Job], None]", vars(campaign)["supervise"])

    def lost(job: Job, *_: Any) -> LaunchFailure:
        passing(job)
        return LaunchFailure(
            verdict=Verdict.RANK_FAULT, case_index=None, reasons=[Reason(code="why", message="rank 1 went")]
        )

    monkeypatch.setattr(campaign, "supervise", lost)
    out = tmp_path / "out"
    assert main(["run", "--model=tiny", "--nproc=2", f"--out={out}"]) == 3
    assert json.loads((out / "summary.json").read_text())["exit_code"] == 3
    assert "event: rank 1 went" in capsys.readouterr().out


@pytest.mark.parametrize("command", [("bisect",), ("shrink",)])
def test_trial_commands_refuse_the_folder_of_a_suite(
    tmp_path: Path, ranks: Ranks, seeds: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks({})
    out = tmp_path / "out"
    suite(out, seeds)
    kept = (out / RESULTS).read_bytes()
    case = tmp_path / "case.json"
    case.write_text('{"model": "tiny"}')
    assert main([*command, str(case), "--nproc=2", f"--out={out}"]) == 2
    assert "holds 4 results of something else" in capsys.readouterr().err
    assert (out / RESULTS).read_bytes() == kept


def included(path: Path, *cases: dict[str, object]) -> Path:
    path.write_text(json.dumps({"defaults": {"model": "tiny"}, "include": list(cases)}))
    return path


class Odd(NamedTuple):
    """A case that cannot run here."""

    keys: dict[str, object]
    verdict: str
    why: str


REFUSED = [
    Odd({"routing": "zipf:x"}, "INVALID", "routing"),
    Odd({"num_experts": 7}, "INVALID", "num_experts = 7: not divisible by 2 ranks"),
    Odd({"tokens": [1, 2, 3]}, "INVALID", "3 numbers for 2 ranks"),
    Odd({"transport": "mori"}, "UNSUPPORTED", "no package mori here"),
    Odd({"device": "cuda"}, "UNSUPPORTED", "torch sees no device"),
]


@pytest.mark.parametrize("odd", REFUSED)
def test_unsupported_case_is_as_expected_if_the_suite_expects_it(tmp_path: Path, ranks: Ranks, odd: Odd) -> None:
    launches = ranks({})
    out = tmp_path / "out"
    file = included(tmp_path / "odd.json", {"name": "odd", "expect": odd.verdict} | odd.keys, {"name": "sound"})
    for _ in range(2):
        assert suite(out, file) == 0
        assert launches == [["sound"]]
        told = json.loads(lines(out)["odd"])
        assert (told["verdict"], told["as_expected"]) == (odd.verdict, True)
        assert odd.why in told["reasons"][0]["message"]
        assert json.loads((out / "summary.json").read_text())["as_expected"] == 2


@pytest.mark.parametrize("odd", REFUSED)
def test_case_that_cannot_run_is_named_with_its_file(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str], odd: Odd
) -> None:
    launches = ranks({})
    file = included(tmp_path / "odd.json", {"name": "sound"}, {"name": "odd one"} | odd.keys)
    assert suite(tmp_path / "out", file) == Verdict(odd.verdict).exit_code
    told = capsys.readouterr().err
    assert told.startswith(f"distbench: {odd.verdict}: {file}: case odd one: ")
    assert odd.why in told
    assert told.count("\n") == 1
    assert launches == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_under_torchrun_count_devices_themselves(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    ranks({})
    jobs: list[Job] = []
    variables = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank}
    variables |= {"LOCAL_RANK": rank, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def work(job: Job) -> int:
        jobs.append(job)
        return 7

    monkeypatch.setattr(launching, "work", work)
    monkeypatch.setattr(rank_command, "_all_held", lambda *_, **__: contextlib.nullcontext())
    file = included(
        tmp_path / "odd.json", {"name": "cuda", "device": "cuda"}, {"name": "odd", "expect": "INVALID", "topk": 99}
    )
    assert main(["suite", str(file), f"--out={tmp_path / 'out'}"]) == 7
    (job,) = jobs
    assert [(entry.name, bool(entry.refused)) for entry in job.entries] == [("cuda", False), ("odd", True)]


def test_refusal_under_torchrun_is_recorded_once_by_rank_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = Entry(name="odd", case=tiny_case(2), sources={}, expect="INVALID", refused="makes no sense")
    for _ in range(2):
        sink = Sink(tmp_path, [entry], prints=True)
        assert sink.codes == {case_hash(entry.case): 0}
        sink.close()
    assert json.loads(lines(tmp_path)["odd"])["reasons"] == [{"code": "invalid", "message": "makes no sense"}]
    assert capsys.readouterr().out.split() == ["INVALID", "0.000", "s", "odd"]


def test_occupied_rendezvous_port_is_refused(
    tmp_path: Path, ranks: Ranks, seeds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = ranks({})
    with socket.create_server(("", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        assert suite(tmp_path / "out", seeds, "--nnodes=2", f"--rdzv-endpoint={endpoint}") == 2
    told = f"distbench: INVALID: --rdzv-endpoint {endpoint}: Address already in use on node 0; use another port\n"
    assert capsys.readouterr().err == told
    assert launches == []


def test_suite_without_remaining_cases_starts_no_rank(tmp_path: Path, ranks: Ranks) -> None:
    launches = ranks({})
    file = included(tmp_path / "odd.json", {"expect": "INVALID", "topk": 99})
    assert suite(tmp_path / "out", file) == 0
    assert launches == []


COMMANDS = (
    ("run", ["--nproc", "--lock-timeout", "--nnodes", "--join-timeout"]),
    ("suite smoke", ["--nproc", "--lock-timeout", "--retries", "--max-faults", "--nnodes", "--join-timeout"]),
    ("sweep", ["--nproc", "--lock-timeout"]),
    ("selftest", ["--nproc", "--lock-timeout", "--seeds", "--clean"]),
    ("shrink case.json", ["--nproc", "--lock-timeout"]),
    ("bisect case.json", ["--nproc", "--lock-timeout"]),
    ("replay bundle", ["--lock-timeout"]),
    ("collect folder", ["--lock-timeout"]),
    ("cluster smoke", ["--nproc", "--port", "--trial-timeout"]),
    ("doctor", ["--nproc", "--nodes", "--block-num", "--rdma-block-num"]),
    ("kernels", ["--ep-size"]),
    ("advise", ["--ep-size", "--steps", "--layers"]),
    ("tune", ["--ep-size", "--processes"]),
)
FROM_0 = ("--lock-timeout", "--retries", "--clean")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (command, option, value)
        for command, known in COMMANDS
        for option in known
        for value in ("-1", "nan", "x", "1e99", "", *(() if option in FROM_0 else ("0",)))
    ],
)
def test_numeric_option_outside_its_bounds_is_refused(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), f"{option}={value}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        f"distbench: INVALID: argument {'-n/' * (option == '--nproc')}{option}: {value!r} is refused; allowed are "
    )
    assert told.endswith(f"; see `distbench {command.split(maxsplit=1)[0]} --help`\n")
    assert told.count("\n") == 1


@pytest.mark.parametrize("command", [["suite", "smoke"], ["run"], ["sweep"], ["selftest", "--quick"]])
def test_bundle_folder_that_cannot_be_created_is_refused_before_a_rank_starts(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    launches = ranks({})
    (tmp_path / "file").write_text("")
    bundles = tmp_path / "file" / "bundles"
    where = ["--nproc=2", f"--out={tmp_path / 'out'}", f"--bundle={bundles}"]
    assert main([*command, *where]) == 2
    assert capsys.readouterr().err.endswith(
        f"distbench: INVALID: folder '{bundles}': cannot be written (Not a directory); name another folder\n"
    )
    assert launches == []


@pytest.mark.parametrize(
    ("arguments", "code"), [((), 1), (("--rerun=failed",), 2), (("--rerun=all",), 2)], ids=["resume", "failed", "all"]
)
def test_free_disk_is_checked_for_remaining_cases_only(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int
) -> None:
    ranks(dict.fromkeys(range(8), Verdict.CORRUPT))
    out, eight = tmp_path / "out", write_suite(tmp_path / "eight.json", range(8))
    assert suite(out, eight) == 1
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=65 << 10))
    assert suite(out, eight, *arguments) == code
