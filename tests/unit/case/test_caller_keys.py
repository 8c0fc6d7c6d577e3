"""The keys of a caller: what they refuse, what names code, and the hashes and reports of cases without a caller."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import case_hash, case_values
from distbench.case.unused_keys import unused_keys
from distbench.errors import InvalidCase

AITER = {"experts": "aiter", "emulate": True}


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
    [({}, {"caller": "sglang"}), ({"caller": "sglang"}, {"caller_wheel": "any.whl"}), ({}, {"caller_wheel": "a"})],
)
def test_code_that_a_file_names_and_no_flag_is_refused(flags: dict[str, Any], file: dict[str, Any]) -> None:
    with pytest.raises(InvalidCase, match=r"file:case\.toml: caller(_wheel)? = .* names code to execute"):
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
