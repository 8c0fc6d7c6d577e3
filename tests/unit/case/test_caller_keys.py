"""The keys of a caller: what they refuse, what names code, and the hashes and reports of cases without a caller."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.case.atom_folder import KERNEL
from distbench.case.identity import case_hash, case_values
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.unused_keys import unused_keys
from distbench.cli.shrink import code_flags
from distbench.errors import InvalidCase

AITER = {"experts": "aiter", "emulate": True}
ATOM = AITER | {"caller": "atom"}


def resolve(flags: dict[str, Any], file: dict[str, Any] | None = None) -> Any:
    return resolve_case([Layer(FLAGS, flags, strict=False), Layer("file:case.toml", file or {})], 4)


def test_case_without_a_caller_has_the_hash_and_keys_that_it_had_before_callers() -> None:
    resolved = resolve({"seed": "7"})
    assert case_hash(resolved.case) == "7ec1001be012fdf43c5f8bc71e4af987eace91914f56110c994b477d6b6688b2"
    assert not [key for key in (*case_values(resolved.case), *resolved.sources) if "caller" in key]


def test_caller_and_the_wheels_content_enter_the_hash(tmp_path: Path) -> None:
    wheel, hashes = tmp_path / "one.whl", {case_hash(resolve(AITER).case)}
    hashes.add(case_hash(resolve(AITER | {"caller": "sglang"}).case))
    for content in (b"one", b"two"):
        wheel.write_bytes(content)
        case = resolve(AITER | {"caller": "sglang", "caller_wheel": str(wheel)}).case
        assert case.caller_wheel_sha256 == hashlib.sha256(content).hexdigest()
        hashes.add(case_hash(case))
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("flags", "file"),
    [
        ({}, {"caller": "sglang"}),
        ({"caller": "sglang"}, {"caller_wheel": "any.whl"}),
        ({}, {"caller_wheel": "a"}),
        ({"caller": "atom"}, {"caller_folder": "a"}),
    ],
)
def test_code_that_a_file_names_and_no_flag_is_refused(flags: dict[str, Any], file: dict[str, Any]) -> None:
    with pytest.raises(InvalidCase, match=r"file:case\.toml: caller(_wheel|_folder)? = .* names code to execute"):
        resolve(AITER | flags, file)


def test_code_that_a_flag_names_too_is_the_flags() -> None:
    assert resolve(AITER | {"caller": "sglang"}, {"caller": "sglang"}).case.caller == "sglang"
    assert resolve({"caller": "own"}, {"caller": "sglang"}).case.caller == "own"
    assert resolve({}, {"caller": "own", "caller_wheel": ""}).case.caller == "own"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"experts": "reference"}, "not with experts reference"),
        ({"policy": "guard"}, "not with policy guard"),
        ({"graph": "true"}, "not with graph"),
        ({"inject": "off-by-one"}, "not with inject"),
    ],
)
def test_caller_is_refused_with_parts_that_production_has_not(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidCase, match=f"caller = sglang: {reason}"):
        resolve(AITER | {"caller": "sglang"} | values)


def test_unreadable_wheel_is_refused() -> None:
    with pytest.raises(InvalidCase, match=r"caller_wheel = '/none/such\.whl': cannot be read"):
        resolve(AITER | {"caller": "sglang", "caller_wheel": "/none/such.whl"})


def test_pipe_and_oversized_file_are_refused_as_wheels_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.whl")
    with (tmp_path / "large.whl").open("wb") as large:
        large.truncate((4 << 30) + 1)
    for name, reason in (("pipe.whl", "not a regular file"), ("large.whl", "larger than 4 GiB")):
        with pytest.raises(InvalidCase, match=rf"caller_wheel = .*{name}.*{reason}"):
            resolve(AITER | {"caller": "sglang", "caller_wheel": str(tmp_path / name)})


def test_wheel_without_a_caller_is_reported_as_unused(tmp_path: Path) -> None:
    (tmp_path / "one.whl").write_bytes(b"")
    resolved = resolve({"caller_wheel": str(tmp_path / "one.whl")})
    (line,) = unused_keys(resolved.case, resolved.sources)
    assert "only with a caller" in line


def checkout(folder: Path, text: str = "one = 1\n") -> str:
    (folder / KERNEL).parent.mkdir(parents=True, exist_ok=True)
    (folder / KERNEL).write_text(text)
    return str(folder)


def test_content_of_a_folder_enters_the_hash_and_its_path_does_not(tmp_path: Path) -> None:
    hashes, digests = set(), set()
    for name, text in (("first", "one = 1\n"), ("second", "one = 2\n"), ("third", "one = 1\n")):
        case = resolve(ATOM | {"caller_folder": checkout(tmp_path / name, text)}).case
        hashes.add(case_hash(msgspec.structs.replace(case, caller_folder="")))
        digests.add(case.caller_folder_sha256)
    assert (len(hashes), len(digests)) == (2, 2)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"caller": "vllm", "policy": "unchecked"}, "not with policy unchecked: its own cut loses no row"),
        ({"caller": "vllm", "caller_folder": "."}, "not with caller_folder: give a wheel"),
        ({"caller": "atom", "caller_wheel": "one.whl", "caller_folder": "."}, "not with caller_wheel: ATOM has none"),
        ({"caller": "atom"}, "name the folder that holds it: --caller-folder"),
        (
            {"caller": "atom", "caller_folder": ".", "tokens": "5", "atom_graph_bs": "4"},
            "atom_graph_bs = 4: a rank has 5 tokens, and ATOM's batch has at most 4 on each",
        ),
        (
            {"caller": "atom", "caller_folder": ".", "tokens": "3", "atom_graph_bs": "4", "atom_rule": "vllm-plugin"},
            "atom_graph_bs = 4: a rank has 3 tokens, and ATOM's batch has exactly 4 on each",
        ),
    ],
)
def test_callers_are_refused_with_what_they_have_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(checkout(tmp_path))
    (tmp_path / "one.whl").write_bytes(b"")
    with pytest.raises(InvalidCase, match=reason):
        resolve(AITER | values)


def test_folder_without_atom_and_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidCase, match="has no folder atom; give a checkout of ATOM"):
        resolve(ATOM | {"caller_folder": str(tmp_path)})
    folder = checkout(tmp_path)
    with (tmp_path / KERNEL).open("ab") as large:
        large.truncate((4 << 20) + 1)
    with pytest.raises(InvalidCase, match=f"{KERNEL} is larger than 4 MiB"):
        resolve(ATOM | {"caller_folder": folder})
    (tmp_path / KERNEL).unlink()
    os.mkfifo(tmp_path / KERNEL)
    with pytest.raises(InvalidCase, match=f"{KERNEL} cannot be read"):
        resolve(ATOM | {"caller_folder": folder})


def test_keys_of_atom_are_reported_as_unused_with_another_caller() -> None:
    resolved = resolve(AITER | {"caller": "vllm", "atom_graph_bs": "4", "atom_rule": "vllm-plugin"})
    (line,) = unused_keys(resolved.case, resolved.sources)
    assert "atom_rule=vllm-plugin, atom_graph_bs=4 (only with caller atom)" in line


def test_command_for_a_shrunk_case_names_the_callers_code(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    assert code_flags(resolve(AITER).case) == ""
    assert code_flags(resolve(ATOM | {"caller_folder": folder}).case) == f" --caller atom --caller-folder {folder}"
