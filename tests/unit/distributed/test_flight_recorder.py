"""Ranks whose device is late, from the JSON of each rank's flight recorder."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from distbench.distributed.flight_recorder import Group, as_line, from_stacks, last_collectives, late_ranks
from tests.end_to_end.launches import run_python

NAME = "nccl:all_to_all"


def recording(*states: str, first: int = 1, **others: Any) -> bytes:
    """Recording of collectives in these states, with the keys that torch writes."""
    entries = [
        {
            "record_id": number,
            "process_group": ["0", "default_pg"],
            "collective_seq_id": first + number,
            "profiling_name": NAME,
            "state": state,
            "is_p2p": False,
            "retired": False,
            "timeout_ms": 600_000,
            **others,
        }
        for number, state in enumerate(states)
    ]
    return msgspec.json.encode({"version": "2.10", "entries": entries, "nccl_comm_state": {}})


def test_recording_yields_last_and_first_pending_collective_of_each_group() -> None:
    assert last_collectives(recording("completed", "started", "scheduled")) == [Group("0", 3, NAME, 2, NAME, "started")]
    assert last_collectives(recording("completed", "completed")) == [Group("0", 2, NAME)]


def test_messages_between_two_ranks_and_retired_collectives_are_not_pending() -> None:
    assert last_collectives(recording("scheduled", is_p2p=True)) == []
    assert last_collectives(recording("scheduled", retired=True)) == [Group("0", 1, NAME)]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"entries": [{}]}', b"\x80\x02}q\x00.", b'{"entries": 3}'])
def test_invalid_recording_yields_no_collective(content: bytes) -> None:
    assert last_collectives(content) == []


def test_recording_is_read_from_the_stack_dump_that_precedes_it() -> None:
    groups = [Group("0", 3, NAME, 2, NAME, "started"), Group("1", 1, NAME)]
    text = f'Thread 0x1 (most recent call first):\n  File "x.py", line 1 in y\n{as_line(groups)}\n'
    assert from_stacks(text) == {group.group: group for group in groups}
    assert from_stacks("no answer") == from_stacks("") == {}
    assert from_stacks(as_line([])[:-1]) == {}


def of(*states: str) -> dict[str, Group]:
    return {group.group: group for group in last_collectives(recording(*states))}


# Records of three ranks, the ranks that are late, and the expected message.
NOT_ENTERED, NOT_BEGUN = f"has not entered {NAME} 2 of NCCL group 0", f"has not begun {NAME} 1 of NCCL group 0"
LATE = [
    ((("completed", "started"), ("completed",), ("completed", "started")), {1}, NOT_ENTERED),
    ((("completed",), ("completed",), ("completed", "scheduled")), {0, 1}, NOT_ENTERED),
    ((("started",), ("scheduled",), ("started",)), {1}, NOT_BEGUN),
    ((("completed", "started"), ("started", "scheduled"), ("completed", "started")), {1}, NOT_BEGUN),
    ((("completed",), ("completed",), ("started",)), {2}, NOT_BEGUN),
]


@pytest.mark.parametrize(("states", "ranks", "told"), LATE)
def test_rank_whose_device_has_completed_fewer_collectives_is_late(
    states: tuple[tuple[str, ...], ...], ranks: set[int], told: str
) -> None:
    late = late_ranks({rank: of(*one) for rank, one in enumerate(states)})
    assert late is not None
    assert (late.ranks, late.told) == (ranks, told)


@pytest.mark.parametrize("states", [("started",), ("scheduled",), ("completed",), ()])
def test_no_rank_is_late_if_all_recordings_are_equal(states: tuple[str, ...]) -> None:
    assert late_ranks({rank: of(*states) for rank in range(3)}) is None


# Without a clean-up of the interpreter, in which threads of gloo may abort it.
_BY_GLOO = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(2))
dist.destroy_process_group()  # joins gloo's threads, which retire what has completed
dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", lambda **_: b"none")
sys.stdout.buffer.write(dump(includeCollectives=True, onlyActive=False))
sys.stdout.flush()
os._exit(0)
"""


def test_recording_keys_are_those_that_torch_writes() -> None:
    """The recorder of gloo collectives on a CPU writes the same format; it marks none as completed."""
    content = run_python(_BY_GLOO, TORCH_FR_BUFFER_SIZE="100")
    if content == b"none":
        pytest.skip("this torch records collectives of NCCL only")
    assert last_collectives(content) == [Group("0", 1, "gloo:all_reduce")]
