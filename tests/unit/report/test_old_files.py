"""Files of commit e296384, which ran a case with one kind of inputs, are still read and compared."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from distbench.case.resolve import load_case_file, resolve_case
from distbench.case.suite import load_suite
from distbench.cli.main import main
from distbench.errors import InvalidCase, Verdict
from distbench.report.bundle.analysis import analyse
from distbench.report.bundle.layout import MANIFEST, REPORT, part_name
from distbench.report.bundle.read import Bundle, open_bundle
from distbench.report.files import read_report
from distbench.report.journal import JournalReader, resume_journal, unfinished
from distbench.report.results import Results
from distbench.workload.inputs import Workload
from distbench.workload.version import INPUTS_VERSION

OLD = Path("tests/data/e296384")
REPORTS = {"pass": "PASS", "under-limit": "UNDER_LIMIT", "nondeterministic": "NONDETERMINISTIC"}
JOURNALS = {"one": ["PASS", "PASS"], "two": ["NONDETERMINISTIC"] * 2, "three": ["OVERFLOW", "CORRUPT"]}
NUMERICS = {"default": "both", "exact": "exact", "gaussian": "gaussian"}
BUNDLES = {
    "f725580088e4": ("UNDER_LIMIT", "UNDER_LIMIT"),
    "a3f8b2ac3ca2": ("BASELINE_WRONG", "BASELINE_WRONG"),
    "25b31d924976": ("NONDETERMINISTIC", "CORRUPT"),
}
"""The verdict in the report, and the one that its recording leads to now: a NaN is no kernel's rounding."""


@pytest.mark.parametrize("name", REPORTS)
def test_show_prints_a_report_of_commit_e296384(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = OLD / "reports" / f"{name}.json"
    assert main(["show", str(path)]) in (0, 1)
    assert capsys.readouterr().out.splitlines()[-1].startswith(REPORTS[name])
    report = read_report(str(path))
    assert (report.findings, report.errors, report.blind_spots) == ([], [], [])


@pytest.mark.parametrize("name", JOURNALS)
@pytest.mark.parametrize("kind", ["html", "junit", "md", "csv", "prom", "json"])
def test_report_converts_an_old_journal_to_other_formats(name: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(OLD / "journals" / name, folder)
    unexpected = sum(not result.as_expected for result in Results(folder))
    assert main(["report", str(folder), "--report", kind]) == int(unexpected > 0)
    assert [result.verdict.value for result in Results(folder)] == JOURNALS[name]


@pytest.mark.parametrize("name", JOURNALS)
def test_compare_finds_no_change_in_an_old_journal(name: str) -> None:
    assert main(["compare", str(OLD / "journals" / name), str(OLD / "journals" / name)]) in (0, 77)


def test_compare_reports_changes_between_old_reports() -> None:
    first, other = (str(OLD / "reports" / f"{name}.json") for name in ("pass", "under-limit"))
    assert main(["compare", first, first]) in (0, 77)
    assert main(["compare", first, other]) == 1


@pytest.mark.parametrize("name", JOURNALS)
def test_a_suite_resumes_over_an_old_journal(name: str, tmp_path: Path) -> None:
    shutil.copy(OLD / "journals" / name / "results.jsonl", tmp_path)
    entries = load_suite(str(OLD / "suites" / f"{name}.toml"), 2).entries
    lines = list(JournalReader(tmp_path).new_lines())
    assert [line.verdict.value for line in lines] == JOURNALS[name]
    assert len(unfinished(tmp_path, entries)) == len(entries)  # a case now has further keys, and another hash
    resume_journal(tmp_path, entries)
    assert len(list(JournalReader(tmp_path).new_lines())) == len(lines)


@pytest.mark.parametrize("name", JOURNALS)
def test_old_result_is_judged_by_its_expectation(name: str) -> None:
    entries = {entry.name: entry for entry in load_suite(str(OLD / "suites" / f"{name}.toml"), 2).entries}
    for line in JournalReader(OLD / "journals" / name).new_lines():
        assert line.ended_as(entries[line.name]) is line.as_expected


@pytest.mark.parametrize("name", NUMERICS)
def test_old_case_file_keeps_its_numerics(name: str) -> None:
    layer = load_case_file(str(OLD / "cases" / f"{name}.toml"))
    assert resolve_case([layer], 2).case.numerics == NUMERICS[name]


@pytest.mark.parametrize("name", BUNDLES)
def test_old_bundle_is_judged_with_its_recorded_verdict(name: str) -> None:
    bundle = open_bundle(OLD / "bundles" / name)
    analysis = analyse(bundle)
    assert analysis.judgement is not None
    assert (bundle.report.verdict.value, analysis.judgement.verdict.value) == BUNDLES[name]
    agrees = len(set(BUNDLES[name])) == 1
    assert analysis.trusted
    assert analysis.confirms(Verdict(BUNDLES[name][0]), [found.cause for found in bundle.report.diagnosis]) is agrees


@pytest.mark.parametrize("name", BUNDLES)
def test_replay_analyses_an_old_bundle(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    agrees = len(set(BUNDLES[name])) == 1
    assert main(["replay", str(OLD / "bundles" / name), "--offline"]) == (0 if agrees else 1)
    told = capsys.readouterr().out
    assert f"from the recording: {BUNDLES[name][1]}" in told
    assert "inputs: recorded with inputs of version 1; this distbench generates version 2; rows are compared" in told


@pytest.mark.parametrize("name", BUNDLES)
def test_old_bundle_is_never_compared_with_generated_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "__init__", lambda *_, **__: pytest.fail("inputs were generated"))
    analyse(open_bundle(OLD / "bundles" / name))


def rewritten(name: str, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Bundle:
    """Copy an old bundle, with the tensors of rank 1 changed and vouched for."""
    copy = Path(shutil.copytree(OLD / "bundles" / name, folder / name))
    tensors: dict[str, Tensor] = load((copy / part_name(1)).read_bytes())
    change(tensors)
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    (copy / part_name(1)).write_bytes(content)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["recorded"]["parts"][1] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return open_bundle(copy)


CHANGES = {
    "received row": ("padded.hidden", "dispatch"),
    "expert row": ("padded.experts", "experts"),
    "combined token": ("combined.padded", "combine"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_damage_in_an_old_recording_is_found(what: str, tmp_path: Path) -> None:
    name, stage = CHANGES[what]
    bundle = rewritten("f725580088e4", tmp_path, lambda tensors: tensors[name].view(torch.int16)[0, 0].bitwise_xor_(1))
    analysis = analyse(bundle)
    wrong = {(found.rank, found.arm, found.stage) for found in analysis.findings if found.wrong}
    assert (1, "padded", stage) in wrong
    assert analysis.judgement is not None
    assert analysis.judgement.verdict is Verdict.BASELINE_WRONG
    assert not analysis.confirms(bundle.report.verdict, [found.cause for found in bundle.report.diagnosis])


def test_old_routing_that_contradicts_its_tokens_confirms_nothing(tmp_path: Path) -> None:
    bundle = rewritten("f725580088e4", tmp_path, lambda tensors: tensors["routing"].bitwise_xor_(1))
    analysis = analyse(bundle)
    assert not analysis.trusted
    assert not analysis.confirms(bundle.report.verdict, [found.cause for found in bundle.report.diagnosis])


@pytest.mark.parametrize("oracle", ["token.oracle", "padded.oracle"])
def test_old_exact_bundle_without_its_oracle_is_refused(oracle: str, tmp_path: Path) -> None:
    bundle = rewritten("a3f8b2ac3ca2", tmp_path, lambda tensors: tensors.pop(oracle))
    with pytest.raises(InvalidCase, match=f"there is no {oracle}"):
        analyse(bundle)


def test_old_bundle_without_a_part_compares_the_rows_whose_tokens_are_known(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(OLD / "bundles" / "a3f8b2ac3ca2", tmp_path / "copy"))
    whole = analyse(open_bundle(copy))
    (copy / part_name(1)).unlink()
    part = analyse(open_bundle(copy))
    rows = [sum(found.rows for found in one.findings if found.stage == "dispatch") for one in (whole, part)]
    assert 0 < rows[1] < rows[0] / 2
    assert part.missing
    assert part.judgement is not None
    assert part.judgement.verdict is Verdict.BASELINE_WRONG


@pytest.mark.parametrize("name", ["f725580088e4", "a3f8b2ac3ca2"])
def test_bundle_whose_inputs_are_generated_otherwise_here_is_not_confirmed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(OLD / "bundles" / name, tmp_path / name))
    for file in (MANIFEST, REPORT):
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | {"inputs_version": INPUTS_VERSION}))
    assert main(["replay", str(copy), "--offline"]) == 1
    assert f"from the recording: {BUNDLES[name][1]}, not confirmed: the inputs generated" in capsys.readouterr().out
