"""`make drift`: which wheels are read, the table, and the exit codes."""

from __future__ import annotations

import runpy
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.contract.facts.fact import Fact, Finding, check, difference
from tests.contract.facts.fetch import AITER, MORI, NIGHTLY, VLLM, newest_in
from tests.contract.facts.source import Source

SCRIPT = Path(__file__).parents[3] / "scripts" / "drift.py"
WHEELS = {
    "mori": "amd_mori-1.2.4-cp312-cp312-manylinux_2_39_x86_64.whl",
    "mori, older": "amd_mori-1.2.3-cp312-cp312-manylinux_2_39_x86_64.whl",
    "nightly": "amd_mori_nightly-1.2.5.dev20261026-cp312-cp312-manylinux_2_39_x86_64.whl",
    "sglang": "sglang-0.6.0-py3-none-any.whl",
    "aiter": "amd_aiter-0.1.20-py3-none-any.whl",
}


def limit(package: str, source: Source) -> int:
    return int(source.definition(f"{package}/limits.py", "LIMIT").value.value)


def fact_about(package: str) -> Fact:
    return Fact(f"limit of {package}", package, f"{package}/limits.py", partial(limit, package), lambda _: 8)


@pytest.fixture
def drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script over a folder of small wheels; its arguments replace the text of some, None leaves one out."""
    script = runpy.run_path(str(SCRIPT), run_name="drift")
    script["main"].__globals__["FACTS"] = tuple(map(fact_about, ("mori", "sglang", "aiter", "vllm")))
    monkeypatch.setenv("DISTBENCH_WHEELS", str(tmp_path))
    monkeypatch.delenv("DISTBENCH_VLLM_WHEEL", raising=False)

    def run(**texts: str | None) -> int:
        for name, file in WHEELS.items():
            package = name.partition(",")[0].replace("nightly", "mori")
            text = texts.get(name, "LIMIT = 8\n")
            if text is not None:
                with zipfile.ZipFile(tmp_path / file, "w") as wheel:
                    wheel.writestr(f"{package}/limits.py", text)
        code: int = script["main"]([])
        return code

    return run


def test_releases_that_match_end_with_zero(drift: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert drift() == 0
    out = capsys.readouterr().out
    assert "amd-mori 1.2.4: amd_mori-1.2.4-" in out
    assert "vllm: not read; DISTBENCH_VLLM_WHEEL or DISTBENCH_WHEELS may have its wheel" in out
    assert out.endswith("4 matches, 0 cannot be read, 0 no longer matches\n")


def test_changed_fact_is_named_with_its_release_and_what_is_found(
    drift: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert drift(nightly="LIMIT = 16\n", sglang=None) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "no longer matches  mori 1.2.5.dev20261026  limit of mori",
        "    mori/limits.py: 16 instead of 8",
        "2 matches, 1 cannot be read, 1 no longer matches",
    ]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"sglang": None}, "no wheel of sglang in "),
        ({"aiter": "LIMIT = (\n"}, "aiter/limits.py: SyntaxError"),
        ({"mori": None}, "the newest wheel found is 1.2.3, older than 1.2.4"),
    ],
)
def test_release_that_cannot_be_read_ends_with_three(
    texts: dict[str, str | None], reason: str, drift: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert drift(**texts) == 3
    assert reason in capsys.readouterr().out


def test_damaged_wheel_cannot_be_read(
    drift: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "vllm-0.34.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    damaged.write_bytes(b"no archive")
    monkeypatch.setenv("DISTBENCH_VLLM_WHEEL", str(damaged))
    assert drift() == 3
    assert "vllm: File is not a zip file" in capsys.readouterr().out


def test_newest_wheel_of_a_distribution_is_taken_by_version_not_by_name(tmp_path: Path) -> None:
    for version in ("1.2.10", "1.2.9", "1.2.10rc1"):
        (tmp_path / f"amd_mori-{version}-py3-none-any.whl").touch()
    (tmp_path / "amd_mori_nightly-1.3.0-py3-none-any.whl").touch()
    (tmp_path / "notes.whl").touch()
    assert newest_in(tmp_path, MORI) == tmp_path / "amd_mori-1.2.10-py3-none-any.whl"
    assert newest_in(tmp_path, NIGHTLY) == tmp_path / "amd_mori_nightly-1.3.0-py3-none-any.whl"
    assert newest_in(tmp_path, AITER) is newest_in(tmp_path, VLLM) is None


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        (3, 3, ""),
        (3, 4, "3 instead of 4"),
        ({"a": 1}, {"a": 1, "b": 2}, "gone b"),
        ({"a": 1, "c": 2}, {"a": 1}, "new c"),
        ({"a": {"x": 1}}, {"a": {"x": 2}}, "a: x: 1 instead of 2"),
        ({"a", "b"}, {"b", "c"}, "new a; gone c"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, ""),
    ],
)
def test_difference_says_what_is_found_instead(found: Any, expected: Any, text: str) -> None:
    assert difference(found, expected) == text


def test_code_that_fails_when_executed_is_a_change(tmp_path: Path) -> None:
    path = tmp_path / WHEELS["mori"]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("mori/limits.py", "LIMIT = None\n")
    fact = fact_about("mori")
    found = check(fact, Source(path))
    assert found == Finding(fact, "1.2.4", "no longer matches", found.detail)
    assert found.detail.startswith("mori/limits.py runs otherwise: TypeError: int()")
