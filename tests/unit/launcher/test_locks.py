"""One bench at a time in a folder and on an accelerator; the lock of a process that has ended is free."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from distbench.errors import Busy, InvalidCase
from distbench.launcher import locks
from distbench.launcher.locks import device_lock, hold, is_held

ROOT = Path(__file__).parents[3]
LONG_S = 60.0
"""More than a wait of 0.3 s takes on any machine, and less than a wait that no limit ends."""
HOLDER = """
import sys, time
from pathlib import Path
from distbench.launcher import locks
from distbench.launcher.locks import hold

locks.DEVICE_LOCKS = Path(sys.argv[1]).parent
with hold(Path(sys.argv[1]), sys.argv[2:], 5):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(out: Path, *devices: str) -> Iterator[subprocess.Popen[str]]:
    """Run another process that holds `out` and `devices` until its standard input is closed."""
    command = [sys.executable, "-c", HOLDER, str(out), *devices]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def own_folder_for_device_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "DEVICE_LOCKS", tmp_path)


def test_lock_holder_is_named_without_waiting(out: Path) -> None:
    with holder(out) as process:
        started = time.monotonic()
        with pytest.raises(Busy) as caught, hold(out, (), 0):
            pytest.fail("held twice")
        assert time.monotonic() - started < LONG_S
        since = time.strftime("%Y-%m-%d")
    told = rf"folder {re.escape(str(out))} is in use by process {process.pid} \(-c .*\) since {since} \d\d:\d\d:\d\d; "
    assert re.match(told, str(caught.value))
    assert "--lock-timeout" in str(caught.value)
    assert (caught.value.label, caught.value.exit_code) == ("BUSY", 3)


def test_lock_is_awaited_for_the_given_timeout(out: Path) -> None:
    with holder(out) as process:
        assert process.stdin is not None
        started = time.monotonic()
        with pytest.raises(Busy), hold(out, (), 0.3):
            pytest.fail("held twice")
        assert 0.3 <= time.monotonic() - started < LONG_S
        process.stdin.close()
        with hold(out, (), 5):
            assert process.wait(5) == 0


def test_lock_of_a_killed_process_is_free(out: Path) -> None:
    with holder(out) as process:
        process.kill()
        process.wait()
        with hold(out, (), 0):
            assert f'"pid":{os.getpid()}' in (out / ".lock").read_text()


@pytest.mark.parametrize("note", [b"", b"{", b"\xff", b'{"pid":1,"since":1e300,"command":""}', b"x" * 10_000])
def test_lock_without_a_readable_holder_note_is_reported_as_busy(out: Path, note: bytes) -> None:
    with holder(out):
        (out / ".lock").write_bytes(note)
        with pytest.raises(Busy, match="in use by a process that has left no name"), hold(out, (), 0):
            pytest.fail("held twice")


def test_holder_note_is_shown_in_one_escaped_line(out: Path) -> None:
    with holder(out):
        (out / ".lock").write_text(r'{"pid":1,"since":0,"command":"a\nb\u001b[31m' + "c" * 500 + '"}')
        with pytest.raises(Busy, match=r"process 1 \(a\?b\?\[31mc{70,80}\) since "), hold(out, (), 0):
            pytest.fail("held twice")


def test_device_lock_is_shared_by_all_users_and_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o077)
    try:
        with hold(None, ("cuda:0",), 0):
            assert is_held(device_lock("cuda:0"))
    finally:
        os.umask(before)
    assert not is_held(device_lock("cuda:0"))
    assert stat.S_IMODE(device_lock("cuda:0").stat().st_mode) == 0o666
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert device_lock("cuda:0") == Path("/", "tmp", "distbench-cuda-0.lock")


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "folder"])
def test_foreign_file_at_the_path_of_a_lock_is_not_modified(tmp_path: Path, kind: str) -> None:
    victim, lock = tmp_path / "victim", device_lock("cuda:0")
    victim.write_text("precious")
    put: dict[str, Callable[[], None]] = {
        "link": partial(lock.symlink_to, victim),
        "hard link": partial(lock.hardlink_to, victim),
        "fifo": partial(os.mkfifo, lock),
        "folder": lock.mkdir,
    }
    put[kind]()
    with pytest.raises(InvalidCase, match=r"^lock .*distbench-cuda-0\.lock: .*remove it"), hold(None, ("cuda:0",), 0):
        pytest.fail("held")
    assert victim.read_text() == "precious"


def test_benches_in_different_folders_conflict_only_on_shared_devices(out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with holder(out, "cuda:1", "cuda:0"):
        with hold(other, ("cuda:2",), 0):
            pass
        with pytest.raises(Busy, match=r"^device cuda:1 is in use by process"), hold(other, ("cuda:2", "cuda:1"), 0):
            pytest.fail("held twice")
        with hold(other, ("cuda:2",), 0):  # locks acquired before the refusal were released
            pass


def test_device_locks_are_acquired_in_sorted_order(out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    wanted = ("cuda:1", "cuda:0", "cuda:1")
    with holder(out, "cuda:1", "cuda:0"), pytest.raises(Busy, match=r"^device cuda:0 "), hold(other, wanted, 0):
        pytest.fail("held twice")


def test_locks_are_released_on_an_exception(out: Path) -> None:
    with pytest.raises(KeyError), hold(out, ("cuda:0",), 0):
        raise KeyError
    with hold(out, ("cuda:0",), 0):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = rf"^lock {tmp_path}/.lock: its file system has no locks \({os.strerror(number)}\); .*Lustre: -o flock"
    with pytest.raises(InvalidCase, match=told), hold(tmp_path, (), 0.0):
        pass
