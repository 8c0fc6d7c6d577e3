"""A rank dumps its stacks while its main thread is in a call that no signal interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from distbench.utils.signals import STACKS_SIGNAL
from tests.end_to_end.launches import ROOT, wait_until

_STUCK = """
import ctypes, pathlib, sys
from distbench.launcher.stacks import answer_with_stacks
answer_with_stacks(pathlib.Path(sys.argv[1]))

def in_the_driver():
    print("stuck", flush=True)
    {call}

in_the_driver()
"""
CALLS = {
    "blocked, and holding the interpreter's lock": "ctypes.PyDLL(None).sleep(60)",
    "busy, and holding the interpreter's lock": "sum(iter(int, 1))",
    "blocked": "ctypes.CDLL(None).sleep(60)",
}


def dumps(path: Path, count: int) -> bool:
    """Return whether the stack of the main thread was written `count` times."""
    return path.read_text().count("in in_the_driver") == count


@pytest.mark.parametrize("call", CALLS)
def test_hanging_rank_dumps_the_stack_of_its_main_thread(tmp_path: Path, call: str) -> None:
    path = tmp_path / "stacks"
    command = [sys.executable, "-c", _STUCK.format(call=CALLS[call]), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == b"stuck\n"
            time.sleep(0.2)
            for count in (1, 2):
                os.kill(rank.pid, STACKS_SIGNAL)
                assert wait_until(partial(dumps, path, count), 20)
            assert rank.poll() is None
        finally:
            rank.send_signal(signal.SIGKILL)
    assert "in in_the_driver" in path.read_text().rpartition("(most recent call first):")[2]


_RECORDED = """
import pathlib, sys, time, torch
from distbench.launcher import stacks
entry = b'{"process_group": ["0", ""], "collective_seq_id": 4, "profiling_name": "x", "state": "started"}'
torch._C._distributed_c10d._dump_nccl_trace_json = lambda **_: b'{"entries": [' + entry + b"]}"
stacks.answer_with_stacks(pathlib.Path(sys.argv[1]))
print("stuck", flush=True)
time.sleep(60)
"""


def test_flight_recorder_dump_follows_the_stacks(tmp_path: Path) -> None:
    path = tmp_path / "stacks"
    with subprocess.Popen([sys.executable, "-c", _RECORDED, str(path)], stdout=subprocess.PIPE, cwd=ROOT) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == b"stuck\n"
            os.kill(rank.pid, STACKS_SIGNAL)
            assert wait_until(lambda: path.read_text().endswith('"state":"started"}]\n'), 20)
        finally:
            rank.send_signal(signal.SIGKILL)
    assert "NCCL flight recorder: " in path.read_text()
