"""Compiled kernels are kept as files; one that is not whole is compiled again."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path

import pytest

from distbench.utils import cuda_kernels
from distbench.utils.cuda_kernels import compiled

SOURCE, CODE = "kernel source", bytes(range(256))


class Answer(IntEnum):
    """Two of NVRTC's results."""

    NVRTC_SUCCESS = 0
    NVRTC_ERROR_COMPILATION = 6


class Compiler:
    """Fake of cuda.bindings.nvrtc, whose buffers are written in place as NVRTC does; it compiles SOURCE alone."""

    def __init__(self) -> None:
        self.flags: list[list[bytes]] = []
        self.version = 13, 0

    def nvrtcVersion(self) -> tuple[int, int, int]:  # noqa: N802 - NVRTC's names
        return 0, *self.version

    def nvrtcCreateProgram(self, source: bytes, *_: object) -> tuple[int, bytes]:  # noqa: N802
        return 0, source

    def nvrtcCompileProgram(self, program: bytes, _: int, flags: list[bytes]) -> tuple[Answer]:  # noqa: N802
        self.flags.append(flags)
        return (Answer.NVRTC_SUCCESS if program == SOURCE.encode() else Answer.NVRTC_ERROR_COMPILATION,)

    def nvrtcGetProgramLogSize(self, _: bytes) -> tuple[int, int]:  # noqa: N802
        return 0, 4

    def nvrtcGetProgramLog(self, _: bytes, log: bytes) -> tuple[int]:  # noqa: N802
        return (_written(log, b"log!"),)

    def nvrtcGetCUBINSize(self, _: bytes) -> tuple[int, int]:  # noqa: N802
        return 0, len(CODE)

    def nvrtcGetCUBIN(self, _: bytes, code: bytes) -> tuple[int]:  # noqa: N802
        return (_written(code, CODE),)


def _written(target: bytes, content: bytes) -> int:
    header = bytes.__basicsize__ - 1  # of a bytes object, before its first byte
    ctypes.memmove(id(target) + header, content, len(content))
    return 0


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    fake = Compiler()
    monkeypatch.setattr(cuda_kernels, "_cuda", lambda _: fake)
    return fake


def test_code_is_compiled_once_and_kept_whole(nvrtc: Compiler, tmp_path: Path) -> None:
    assert [compiled(SOURCE, "sm_90a", tmp_path) for _ in range(3)] == [CODE] * 3
    assert nvrtc.flags == [[b"--gpu-architecture=sm_90a", b"--std=c++17"]]
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes().startswith(CODE)


def test_another_architecture_or_version_is_another_file(nvrtc: Compiler, tmp_path: Path) -> None:
    compiled(SOURCE, "sm_90a", tmp_path)
    compiled(SOURCE, "sm_100a", tmp_path)
    nvrtc.version = 13, 1
    compiled(SOURCE, "sm_90a", tmp_path)
    assert len(nvrtc.flags) == len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damaged", [b"", CODE[:100], CODE, b"\0" * 288], ids=["empty", "part", "no digest", "zeros"])
def test_a_file_that_is_not_whole_is_compiled_again(nvrtc: Compiler, tmp_path: Path, damaged: bytes) -> None:
    compiled(SOURCE, "sm_90a", tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(damaged)
    assert [compiled(SOURCE, "sm_90a", tmp_path) for _ in range(2)] == [CODE] * 2
    assert len(nvrtc.flags) == 2


def test_a_write_that_fails_leaves_nothing(nvrtc: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        compiled(SOURCE, "sm_90a", tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(nvrtc.flags) == 1


@pytest.mark.usefixtures("nvrtc")
def test_a_source_that_does_not_compile_names_the_log_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="NVRTC_ERROR_COMPILATION: log!"):
        compiled("wrong", "sm_90a", tmp_path)
    assert not list(tmp_path.iterdir())
