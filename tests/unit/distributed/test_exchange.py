"""Ranks of one host find each other and exchange rows through memory; here each rank is a thread."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from distbench.distributed import peers, shared_memory
from distbench.distributed.peers import Everyones, Neighbours, find_neighbours
from distbench.distributed.shared_memory import SharedMemory, mapped_bytes

TIMEOUT_S = 20.0
Result = TypeVar("Result")


class Table:
    """`Everyones` among threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=TIMEOUT_S)
        self._rows: dict[int, Tensor] = {}

    def of(self, rank: int) -> Everyones:
        def everyones(mine: Tensor) -> Tensor:
            self._rows[rank] = mine
            self._barrier.wait()
            table = torch.stack([self._rows[one] for one in sorted(self._rows)])
            self._barrier.wait()
            return table

        return everyones


def together(ranks: int, work: Callable[[int], Result]) -> list[Result]:
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, range(ranks)))


def found(ranks: int) -> list[Neighbours | None]:
    table, size = Table(ranks), mapped_bytes(ranks)
    return together(ranks, lambda rank: find_neighbours(rank, table.of(rank), size))


@contextlib.contextmanager
def memories(ranks: int, timeout_s: float = TIMEOUT_S) -> Iterator[list[SharedMemory]]:
    connected = [one for one in found(ranks) if one is not None]
    assert len(connected) == ranks
    yield [SharedMemory(one, timeout_s) for one in connected]
    for one in connected:
        for file in (one.file, *one.events):
            os.close(file)
        for peer in one.peers:
            for file in (peer.file, *peer.events):
                os.close(file)
            peer.line.close()


def counts_of(ranks: int, seed: int) -> list[list[int]]:
    """Rows that each rank sends to each, [ranks][ranks]: often none, sometimes many."""
    chosen = random.Random(seed)
    return [[chosen.choice([0, 0, 1, 3, 40]) for _ in range(ranks)] for _ in range(ranks)]


def rows_of(source: int, target: int, seed: int, count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed((source * 64 + target) * 1000 + seed)
    return torch.randint(0, 256, (count, width), dtype=torch.uint8, generator=generator)


def exchanged(memory: SharedMemory, rank: int, counts: list[list[int]], seed: int) -> bool:
    """Exchange rows of one width; return whether this rank received all sent rows and nothing else was written."""
    width, ranks = 8 * (1 + seed % 5), range(len(counts))
    received = [counts[peer][rank] if peer != rank else 0 for peer in ranks]
    sent = [count if peer != rank else 0 for peer, count in enumerate(counts[rank])]
    leaving = torch.cat([rows_of(rank, peer, seed, sent[peer], width) for peer in ranks])
    incoming = torch.full((sum(received), width), 0xA5, dtype=torch.uint8)
    if seed % 2:
        memory.run(incoming, leaving, received, sent)
    else:
        for rows in memory.start(incoming, leaving, received, sent):
            rows.wait()
    return torch.equal(incoming, torch.cat([rows_of(peer, rank, seed, received[peer], width) for peer in ranks]))


def lay_for_rank_0(memory: SharedMemory, count: int) -> None:
    memory.start(torch.zeros(0, 8, dtype=torch.uint8), torch.zeros(count, 8, dtype=torch.uint8), [0, 0], [count, 0])


def take_of_rank_1(memory: SharedMemory, count: int) -> None:
    memory.run(torch.zeros(count, 8, dtype=torch.uint8), torch.zeros(0, 8, dtype=torch.uint8), [0, count], [0, 0])


def awkward(memory: SharedMemory, rank: int, ranks: int, turns: int) -> list[str]:
    """Make exchanges of different kinds in turn with random sleeps; return the errors."""
    wrong = []
    for turn in range(turns):
        if random.Random(turn * 64 + rank).random() < 0.2:
            time.sleep(0.002)
        if not exchanged(memory, rank, counts_of(ranks, turn), turn):
            wrong.append(f"rows of turn {turn}")
        if turn % 3 == 0:
            table = memory.everyones(torch.tensor([rank, turn]))
            if table.tolist() != [[peer, turn] for peer in range(ranks)]:
                wrong.append(f"table of turn {turn}")
        if turn % 3 == 1 and memory.words(bytes([rank, turn])) != [bytes([peer, turn]) for peer in range(ranks)]:
            wrong.append(f"words of turn {turn}")
        for again in range(turn % 11 if turn % 3 == 0 else 0):
            block = torch.full((2, turn, 3), rank + again * 64, dtype=torch.int16)
            gathered = memory.gathered(block)
            expected = [[[[peer + again * 64] * 3] * turn] * 2 for peer in range(ranks if rank == 0 else 0)]
            if gathered.tolist() != expected:
                wrong.append(f"gathered in turn {turn}, {again}")
    return wrong


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_row_arrives_if_any_rank_is_late(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = shared_memory._read  # noqa: SLF001 - a reader is held up in the middle of an exchange

    def slow(file: int, place: memoryview, start: int) -> None:
        if random.random() < 0.05:
            time.sleep(0.003)
        read(file, place, start)

    monkeypatch.setattr(shared_memory, "_read", slow)
    monkeypatch.setattr(shared_memory, "_SLOT_ROWS", 400)  # exchanges of few rows and of many
    with memories(ranks) as joined:
        assert together(ranks, lambda rank: awkward(joined[rank], rank, ranks, 60)) == [[]] * ranks


def test_shared_memory_is_reused_between_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_SLOT_ROWS", 0)
    with memories(2) as joined:
        together(2, lambda rank: awkward(joined[rank], rank, 2, 120))
        largest = max(sum(counts_of(2, turn)[0]) * 8 * (1 + turn % 5) for turn in range(120))
        assert os.fstat(joined[0]._file).st_size <= mapped_bytes(2) + 3 * largest  # noqa: SLF001 - see above


def test_shared_memory_does_not_grow_over_consecutive_gathers() -> None:
    block = torch.zeros(shared_memory._SLOT_ROWS + 1, dtype=torch.uint8)  # noqa: SLF001 - rows that fit no slot
    with memories(2) as joined:
        together(2, lambda rank: [joined[rank].gathered(block) for _ in range(50)])
        assert os.fstat(joined[1]._file).st_size <= mapped_bytes(2) + 8 * block.nbytes  # noqa: SLF001 - see above


@pytest.mark.parametrize("ends", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_rank_that_waits_for_a_lost_peer_raises_an_error_that_names_it(ends: int) -> None:
    with memories(3) as joined:
        for peer in joined[2]._peers:  # noqa: SLF001 - as the end of a process does
            peer.line.shutdown(ends)
        with pytest.raises(OSError, match="rank 2: connection closed by peer"):
            together(2, lambda rank: exchanged(joined[rank], rank, counts_of(3, 0), 0))


def test_wait_for_a_silent_peer_times_out() -> None:
    with memories(2, timeout_s=0.0) as joined:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="rank 1 sent nothing for exchange 1: timed out"):
            joined[0].everyones(torch.zeros(1))
        assert time.monotonic() - started < TIMEOUT_S / 2


def test_mismatched_byte_counts_of_an_exchange_are_refused() -> None:
    with memories(2) as joined:
        lay_for_rank_0(joined[1], 3)
        with pytest.raises(
            RuntimeError, match="rank 1 sends 24 bytes in exchange 1, this rank expects 16 in exchange 1"
        ):
            take_of_rank_1(joined[0], 2)


def test_peer_that_exchanges_with_all_while_rank_0_gathers_is_refused() -> None:
    with memories(2) as joined:
        lay_for_rank_0(joined[1], 3)
        with pytest.raises(
            RuntimeError, match="rank 1 sends 24 bytes in exchange 1, this rank expects 8 in exchange 1"
        ):
            joined[0].gathered(torch.zeros(8, dtype=torch.uint8))


def test_peer_at_another_exchange_number_is_refused() -> None:
    with memories(2) as joined:
        joined[1]._calls = 4  # noqa: SLF001 - a fault that no public call can cause
        lay_for_rank_0(joined[1], 3)
        with pytest.raises(
            RuntimeError, match="rank 1 sends 24 bytes in exchange 5, this rank expects 24 in exchange 1"
        ):
            take_of_rank_1(joined[0], 3)


def test_rows_that_are_not_in_the_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_write", lambda *_: None)  # a fault that no public call can cause
    monkeypatch.setattr(shared_memory, "_SLOT_ROWS", 0)
    with memories(2) as joined:
        lay_for_rank_0(joined[1], 3)
        with pytest.raises(PermissionError):
            os.ftruncate(joined[1]._file, 10)  # noqa: SLF001 - it would end the ranks that map the file
        with pytest.raises(RuntimeError, match="shared memory: 24 bytes at 240 are not there"):
            take_of_rank_1(joined[0], 3)


def test_ranks_on_several_hosts_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = iter([1, 1, 2])
    monkeypatch.setattr(peers, "_place", lambda: next(hosts))
    before = _open_files()
    assert found(3) == [None] * 3
    assert _open_files() == before


@pytest.mark.parametrize("missing", ["memfd_create", "eventfd", "socket"])
def test_no_rank_shares_memory_if_one_cannot(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, turns = peers._open_door, iter(range(3))  # noqa: SLF001 - one rank of three fails in it

    def open_door(stack: contextlib.ExitStack, size: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if next(turns) == 1:
                patch.setattr(socket if missing == "socket" else os, missing, _refused)
            return opened(stack, size)

    table, order = Table(3), threading.Lock()

    def one_at_a_time(stack: contextlib.ExitStack, size: int) -> Any:
        with order:
            return open_door(stack, size)

    monkeypatch.setattr(peers, "_open_door", one_at_a_time)
    before = _open_files()
    assert together(3, lambda rank: find_neighbours(rank, table.of(rank), mapped_bytes(3))) == [None] * 3
    assert _open_files() == before


def test_no_rank_shares_memory_if_one_declines() -> None:
    table, before = Table(3), _open_files()
    found_by = together(3, lambda rank: find_neighbours(rank, table.of(rank), mapped_bytes(3), willing=rank != 1))
    assert found_by == [None] * 3
    assert _open_files() == before


def test_all_ranks_use_the_network_if_one_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    call = peers._call  # noqa: SLF001 - one rank of three fails in it
    monkeypatch.setattr(peers, "_call", lambda *of: None if of[2] == 2 else call(*of))
    before = _open_files()
    assert found(3) == [None] * 3
    assert _open_files() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can call as another user")
def test_connection_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    call, strangers = peers._call, []  # noqa: SLF001 - a stranger calls first

    def call_after_a_stranger(opened: Any, door: Any, rank: int, names: list[int]) -> Any:
        if rank == 1:
            strangers.append(_call_as_another(names[0]))
        return call(opened, door, rank, names)

    monkeypatch.setattr(peers, "_call", call_after_a_stranger)
    with memories(2) as joined:
        assert together(2, lambda rank: awkward(joined[rank], rank, 2, 3)) == [[]] * 2
    for pid in strangers:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert strangers


def _call_as_another(name: int) -> int:
    """Connect a process of another user and keep its connection open; return its process id."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.connect(b"\0" + name.to_bytes(8, "little").rstrip(b"\0"))
        line.send(bytes(8))
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return pid


def _refused(*_: object, **__: object) -> None:
    message = "refused"
    raise OSError(message)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
