"""`distbench bundle`: what the archive holds, that no secret is in it, its size, and the summary to paste."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from distbench.case.identity import case_hash
from distbench.case.resolve import load_case_file, resolve_case
from distbench.case.trace_name import TraceName
from distbench.cli.main import main
from distbench.errors import InvalidCase, Verdict
from distbench.report.bundle.analysis import analyse
from distbench.report.bundle.archive import MIB, write_archive
from distbench.report.bundle.layout import KERNEL_TABLE, TRACE
from distbench.report.bundle.masking import MASK, Masking
from distbench.report.bundle.read import open_bundle, read_part, runnable_case
from distbench.report.bundle.summary import MOST_CHARACTERS, summary_text
from distbench.report.files import read_report, write_report
from distbench.report.schema import Report
from distbench.workload.routing_spec import recorded_slice
from distbench.workload.trace_file import read_header, read_slice, read_tensors, trace_bytes
from distbench.workload.trace_tensors import Tensors
from tests.cases import tiny_case
from tests.distributed.bundles import leave_bundle, run_healthy
from tests.reports import report_of
from tests.results import write_results

HASH = "f725580088e4"
RECORDED = Path(__file__).parents[3] / "data" / "e296384" / "bundles" / HASH
SECRET = "correct-horse-battery"  # noqa: S105 - the test looks for it


def unpacked(archive: Path, folder: Path) -> Path:
    """The one folder in an archive, unpacked in `folder`."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    (only,) = folder.iterdir()
    return only


def report_with(**changes: Any) -> Report:
    return msgspec.structs.replace(read_report(str(RECORDED / "report.json")), **changes)


def test_bundle_of_recorded_rows_unpacks_to_a_folder_that_replay_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "sent.zip"
    assert main(["bundle", str(RECORDED), "--out", str(archive)]) == 0
    folder = unpacked(archive, tmp_path / "there")
    assert folder.name == HASH
    assert {path.name for path in folder.iterdir()} == {
        *("summary.txt", "report.json", "case.json", "results.html", "manifest.json"),
        *(path.name for path in RECORDED.glob("*.safetensors")),
    }
    bundle = open_bundle(folder)
    assert all(read_part(bundle, part).content for part in bundle.manifest.recorded.parts)
    assert bundle.report == read_report(str(RECORDED / "report.json"))
    assert "UNDER_LIMIT" in (folder / "results.html").read_text()
    shown = capsys.readouterr()
    assert shown.out == (folder / "summary.txt").read_text()
    assert f"distbench replay {HASH}    (4 failing tokens recorded)" in shown.out
    assert f"distbench: {archive}: {-(-archive.stat().st_size // 1024)} KiB; attach it" in shown.err


def test_case_file_of_an_archive_is_the_case_of_the_report(tmp_path: Path) -> None:
    case = tiny_case(2, tokens=(5, 3), limit="max-recv-1", policy="unchecked", routing="zipf:1.2")
    write_report(tmp_path / "report.json", report_of(case, "experts: other values"))
    assert main(["bundle", str(tmp_path / "report.json"), "--out", str(tmp_path)]) == 0
    (archive,) = tmp_path.glob("distbench-*.zip")
    folder = unpacked(archive, tmp_path / "there")
    assert case_hash(resolve_case([load_case_file(str(folder / "case.json"))], None).case) == case_hash(case)
    assert "no rows are recorded; `distbench run … --bundle DIR`" in (folder / "summary.txt").read_text()


def test_same_content_makes_the_same_archive(tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        assert main(["bundle", str(RECORDED), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_no_file_of_an_archive_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTBENCH_SECRET", SECRET)
    report = read_report(str(RECORDED / "report.json"))
    variables = {
        "MORI_API_KEY": "by-its-name",
        "NCCL_NET": "http://user:by-its-url@proxy",
        "MORI_NOTE": "WANDB_API_KEY=by-assignment ok",
        "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "4096",
        "GLOO_SOCKET_IFNAME": f"Bearer by-its-scheme; hf_{'x' * 20}",
    }
    sent = msgspec.structs.replace(
        report,
        warnings=[f"the secret is {SECRET}"],
        stacks={"0": f"-----BEGIN RSA PRIVATE KEY-----\nby-its-frame\n{SECRET}"},
        environment=msgspec.structs.replace(report.environment, variables=variables),
    )
    write_report(tmp_path / "report.json", sent)
    assert main(["bundle", str(tmp_path / "report.json"), "--out", str(tmp_path / "sent.zip")]) == 0
    folder = unpacked(tmp_path / "sent.zip", tmp_path / "there")
    text = "".join(path.read_text() for path in folder.iterdir())
    assert not [word for word in (SECRET, "by-its", "by-assignment", "hf_x") if word in text]
    masked = json.loads((folder / "report.json").read_text())["environment"]["variables"]
    assert masked["SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] == "4096"
    assert masked["NCCL_NET"] == f"http://{MASK}@proxy"
    assert masked["MORI_NOTE"] == f"WANDB_API_KEY={MASK} ok"
    assert "secrets masked: 8" in (folder / "summary.txt").read_text()


def test_kernel_table_is_sent_without_its_secrets_and_replay_takes_what_was_sent(tmp_path: Path) -> None:
    table = tmp_path / "tuned.csv"
    table.write_text(Path("tests/data/splitk.csv").read_text() + "# WANDB_API_KEY=by-assignment of who tuned it\n")
    case = tiny_case(2, limit="max-recv-1", policy="unchecked", kernel_table="tests/data/splitk.csv")
    folder = tmp_path / "bundle"
    leave_bundle(folder, run_healthy, case)
    shutil.copy(table, folder / KERNEL_TABLE)
    text = (folder / "manifest.json").read_text()
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(text.replace(case.kernel_table_sha256, digest))
    assert main(["bundle", str(folder), "--out", str(tmp_path / "sent.zip")]) == 0
    sent = unpacked(tmp_path / "sent.zip", tmp_path / "there")
    assert "by-assignment" in table.read_text()
    assert "by-assignment" not in "".join(path.read_text(errors="replace") for path in sent.iterdir())
    assert "secrets masked: 1" in (sent / "summary.txt").read_text()
    assert runnable_case(open_bundle(sent)).kernel_table == str(sent / KERNEL_TABLE)


def test_recorded_routing_is_sent(tmp_path: Path) -> None:
    trace = tmp_path / "t.safetensors"
    made = ["trace", "synth", f"--out={trace}", "--ep-size=2", "--num-experts=8", "--topk=2", "--tokens=7"]
    assert main([*made, "--steps=3"]) == 0
    keys: dict[str, Any] = {
        "tokens": (7, 7),
        "routing": f"trace:{trace}@2.0",
        "limit": "max-recv-1",
        "policy": "unchecked",
    }
    case = tiny_case(2, topk=2, model="custom", hidden_size=256, intermediate_size=128, num_experts=8, **keys)
    leave_bundle(tmp_path / "bundle", run_healthy, case)
    routed = read_slice(read_header(str(trace)), 2, 0).ids.tolist()
    trace.unlink()
    assert main(["bundle", str(tmp_path / "bundle"), "--out", str(tmp_path / "sent.zip")]) == 0
    sent = unpacked(tmp_path / "sent.zip", tmp_path / "there")
    recorded_slice.cache_clear()
    bundle = open_bundle(sent)
    again = runnable_case(bundle)
    assert again.routing == f"trace:{sent}/routing.safetensors"
    assert recorded_slice(TraceName(str(sent / TRACE))).ids.tolist() == routed
    found = analyse(bundle)
    assert found.trusted
    assert found.judgement is not None
    assert found.judgement.verdict is Verdict.UNDER_LIMIT
    (sent / TRACE).write_bytes((sent / TRACE).read_bytes() + b" ")
    with pytest.raises(InvalidCase, match="has another SHA-256 than the manifest says"):
        analyse(bundle)
    summary = (sent / "summary.txt").read_text()
    assert f"--routing trace:{sent.name}/routing.safetensors" in summary
    assert "HIDDEN STATES" not in summary


@pytest.mark.parametrize("numerics", ["gaussian", "exact"])
def test_summary_warns_of_recorded_hidden_states_that_the_case_used(tmp_path: Path, numerics: str) -> None:
    trace = tmp_path / "t.safetensors"
    made = ["trace", "synth", f"--out={trace}", "--ep-size=2", "--num-experts=8", "--topk=2", "--tokens=7"]
    assert main(made) == 0
    header = read_header(str(trace))
    states = np.random.default_rng(0).integers(0x3F00, 0x4000, (14, 256)).astype(np.uint16)
    one = read_slice(header, 0, 0)._replace(tensors=Tensors("bf16", (states,)))
    trace.write_bytes(trace_bytes(header, {(0, 0): one}))
    keys: dict[str, Any] = {"tokens": (7, 7), "routing": f"trace:{trace}", "numerics": numerics}
    keys |= {"limit": "max-recv-1", "policy": "unchecked"}
    case = tiny_case(2, topk=2, model="custom", hidden_size=256, intermediate_size=128, num_experts=8, **keys)
    leave_bundle(tmp_path / "bundle", run_healthy, case)
    assert main(["bundle", str(tmp_path / "bundle"), "--out", str(tmp_path / "sent.zip")]) == 0
    sent = unpacked(tmp_path / "sent.zip", tmp_path / "there")
    used = numerics == "gaussian"
    assert ("HAS HIDDEN STATES OF USERS' REQUESTS" in (sent / "summary.txt").read_text()) == used
    kept = read_tensors(read_header(str(sent / TRACE)), 0, 0, 14)
    assert (kept is not None) == used
    assert kept is None or (kept.parts[0] == states).all()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ('{"DB_PASSWORD": "by its name"}', '{"DB_PASSWORD": [masked]}'),
        ("{'HF_TOKEN': 'known-to-all'}", "{'HF_TOKEN': '[masked]'}"),
        ("run --api-key=by-its-name -v", "run --api-key=[masked] -v"),
        ("Authorization: Basic dXNlcjpieS1pdHM=", "Authorization: [masked]"),
    ],
)
def test_secret_in_json_a_flag_or_a_header_is_masked_once(text: str, masked: str) -> None:
    masking = Masking({"ANY_SECRET": "known-to-all"})
    assert (masking.text(text), masking.count) == (masked, 1)


@pytest.mark.parametrize(
    "text",
    ["rank 0 receives 8 rows: 1 lost", "source rank:token 4:30", "token: 30", "SGLANG_MAX_TOKENS=16384", "kernel=ck_1"],
)
def test_text_without_a_secret_stays(text: str) -> None:
    masking = Masking({"HOME": "rows"})
    assert (masking.text(text), masking.count) == (text, 0)


def test_recorded_rows_that_do_not_fit_are_left_out_and_named(tmp_path: Path) -> None:
    report, bundle = report_with(), open_bundle(RECORDED)
    sent = write_archive(tmp_path / "whole.zip", report, bundle, MIB, Masking({}))
    assert not sent.left_out
    small = write_archive(tmp_path / "small.zip", report, bundle, sent.size + (96 << 10) - 1000, Masking({}))
    assert [what.split()[0] for what in small.left_out] == ["rank-00001.safetensors"]
    folder = unpacked(tmp_path / "small.zip", tmp_path / "there")
    assert "left out of the archive for its size: rank-00001.safetensors (" in (folder / "summary.txt").read_text()
    assert not (folder / "rank-00001.safetensors").exists()
    assert (tmp_path / "small.zip").stat().st_size == small.size < sent.size


def test_archive_stays_within_its_bound_whatever_the_summary_holds(tmp_path: Path) -> None:
    reason = read_report(str(RECORDED / "report.json")).reasons[0]
    long = msgspec.structs.replace(reason, message="".join(chr(0x4E00 + n * 7 % 20_000) for n in range(3_000)))
    report = report_with(reasons=[long] * 400, warnings=[long.message] * 40)
    sent = write_archive(tmp_path / "sent.zip", report, open_bundle(RECORDED), 300 << 10, Masking({}))
    assert sent.size <= 300 << 10
    assert len(sent.summary) < MOST_CHARACTERS + 100


def test_report_that_does_not_fit_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidCase, match=r"the report alone takes \d+ bytes, allowed are 99304; give more --most"):
        write_archive(tmp_path / "sent.zip", report_with(), None, (96 << 10) + 1000, Masking({}))
    assert not list(tmp_path.iterdir())


def test_damaged_recording_is_refused_and_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / HASH
    folder.mkdir()
    for path in RECORDED.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    part = folder / "rank-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert main(["bundle", str(folder), "--out", str(tmp_path / "sent.zip")]) == 2
    assert "rank-00001.safetensors: has another SHA-256 than the manifest says" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [HASH]


def test_hostile_report_names_no_path_and_its_text_stays_in_the_fence(tmp_path: Path) -> None:
    report = report_with(name="```\n@everyone <script> \x1b[31m", case={"hash": "../../../etc/passwd"})
    sent = write_archive(tmp_path / "sent.zip", report, None, MIB, Masking({}))
    with zipfile.ZipFile(tmp_path / "sent.zip") as archive:
        assert {Path(name).parent.as_posix() for name in archive.namelist()} == {"report"}
    first, *lines, last = sent.summary.splitlines()
    assert (first, last) == ("```text", "```")
    assert not [line for line in lines if "```" in line or not line.isprintable()]
    assert "case '''\\n@everyone <script> \\x1b[31m" in sent.summary


def test_long_report_has_a_summary_of_bounded_length() -> None:
    report = report_with(warnings=["w" * 5000] * 100, name="n" * 5000)
    text = summary_text(report, ["x" * 700] * 100)
    assert len(text) < MOST_CHARACTERS + 100
    assert text.endswith("… (more in report.json)\n```\n")
    assert "… 88 more in report.json" in text


def test_one_case_of_several_has_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [
        json.loads(msgspec.json.encode(report_of(tiny_case(2, seed=seed), "x", name=f"seed {seed}"))) for seed in (1, 2)
    ]
    results = str(write_results(tmp_path / "results", whole))
    assert main(["bundle", results]) == 2
    hashes = [report["case"]["hash"] for report in whole]
    both = f"seed 1 ({hashes[0][:12]}), seed 2 ({hashes[1][:12]})"
    assert f"2 of 2 cases did not end as expected: {both}; name one with --case" in capsys.readouterr().err
    for word, name in (("seed 2", "seed 2"), (hashes[0][:12], "seed 1")):
        assert main(["bundle", results, "--case", word, "--out", str(tmp_path / "sent.zip")]) == 0
        assert f"case {name}, " in capsys.readouterr().out
    assert main(["bundle", results, "--case", "seed 33"]) == 2
    assert "0 cases are 'seed 33' (did you mean seed " in capsys.readouterr().err


def test_rows_are_found_in_the_folder_that_bundle_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, out = str(RECORDED / "report.json"), ["--out", str(tmp_path / "sent.zip")]
    assert main(["bundle", report, "--bundle", str(RECORDED.parent), *out]) == 0
    assert "(4 failing tokens recorded)" in capsys.readouterr().out
    assert main(["bundle", report, "--bundle", str(RECORDED.parent / "a3f8b2ac3ca2"), *out]) == 2
    assert f"of case a3f8b2ac3ca2, not of {HASH}; give that one's" in capsys.readouterr().err
    assert main(["bundle", report, "--bundle", str(tmp_path), *out]) == 2
    assert "manifest.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[" * 5000, b'{"schema": "distbench.report/1"}'])
def test_what_is_no_report_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["bundle", str(path), "--out", str(tmp_path / "sent.zip")]) == 2
    assert capsys.readouterr().err.startswith("distbench: INVALID: ")
    assert not (tmp_path / "sent.zip").exists()


def test_archive_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["bundle", str(RECORDED), "--out", str(tmp_path / "file" / "sent.zip")]) == 2
    assert "name another file with --out" in capsys.readouterr().err
