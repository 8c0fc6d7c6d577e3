"""Rows between ranks of one host: each writes its rows to a memory file, sends the offsets, and reads the others'.

gloo's all-to-all has two threads of each rank pass every message through the kernel's network, a fifth of a tiny case's
time. Here a message is a few words, and rows are copied twice; few rows travel in the message itself. Sockets, not
flags in shared memory, signal that rows are ready: no rank spins where ranks outnumber cores, the kernel orders writes
before reads, and a dead peer shows as a closed connection.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, NoReturn

from torch import Tensor

from distbench.distributed.exchange import wait_for
from distbench.distributed.peers import Neighbours, Peer
from distbench.distributed.waits import collective, waiting
from distbench.utils.tensor_memory import memory_of

_WORD = struct.Struct("<qqq")
# Consecutive gathers that only rank 0 waits for: data for the other ranks is kept for this long.
_GATHERS_AHEAD = 3
_EXCHANGE = "exchange in shared memory"
# Bytes for one peer that travel in the message. Those of the messages that a peer may leave unread, two exchanges and
# the gathers between them, have to fit a socket's buffer (208 KiB by Linux's default).
_IN_MESSAGE = 8 << 10

Span = tuple[int, int]
"""Offset and number of bytes."""


class _Laid(NamedTuple):
    """Region of an exchange that a peer may still have to read."""

    start: int
    stop: int
    call: int


class SharedMemory:
    """`Exchange` through shared memory, with all-gather and gather of small tensors between ranks.

    Every rank sends a message to every other in each exchange, even without rows for it. A rank that has finished an
    exchange therefore knows that all ranks have finished the previous ones, and may overwrite its data of those. Only
    rank 0 waits for a gather, a few in a row: tiny cases end with two.
    """

    name = "shared_memory"

    def __init__(self, neighbours: Neighbours) -> None:
        self._rank, self._file, self._peers = neighbours
        self._size = len(self._peers) + 1
        self._calls = 0
        self._gathers = 0
        self._laid: list[_Laid] = []

    def start(
        self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> tuple[_Arriving, ...]:
        """See `Exchange.start`."""
        row_bytes = outgoing.shape[1]
        self._gathers = 0
        self._lay(memory_of(outgoing), _spans(tuple(sent), row_bytes))
        return (_Arriving(self, incoming, _spans(tuple(received), row_bytes)),)

    def run(self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """See `Exchange.run`."""
        wait_for(self.start(incoming, outgoing, received, sent))

    def everyones(self, mine: Tensor) -> Tensor:
        """All-gather of tensors of one shape and dtype: [W, ...] on every rank. Collective."""
        self._gathers = 0
        self._lay(memory_of(mine), [(0, mine.nbytes)] * self._size)
        return self._collected(mine, self._size)

    def words(self, mine: bytes) -> list[bytes]:
        """All-gather of a few bytes, as many from each rank, in rank order. Collective."""
        self._gathers = 0
        size = len(mine)
        self._lay(memoryview(mine), [(0, size)] * self._size)
        everyone = bytearray(size * self._size)
        everyone[self._rank * size : (self._rank + 1) * size] = mine
        self._take(memoryview(everyone), [(rank * size, size) for rank in range(self._size)])
        return [bytes(everyone[rank * size : (rank + 1) * size]) for rank in range(self._size)]

    def gathered(self, mine: Tensor) -> Tensor:
        """Gather of tensors of one shape and dtype: [W, ...] on rank 0, None elsewhere. Collective."""
        together = self._gathers == _GATHERS_AHEAD
        self._gathers = 0 if together else self._gathers + 1
        count = self._size if self._rank == 0 else 0
        waited_for = self._peers if together else [peer for peer in self._peers if peer.rank == 0]
        self._lay(memory_of(mine), [(0, mine.nbytes)] + [(0, 0)] * (self._size - 1), waited_for)
        return self._collected(mine, count) if count or together else mine.new_empty(0, *mine.shape)

    def take(self, incoming: Tensor, spans: Sequence[Span]) -> None:
        """Read each rank's data for this rank into its span of `incoming`, once the rank has announced it."""
        self._take(memory_of(incoming), spans)

    def _take(self, content: memoryview, spans: Sequence[Span]) -> None:
        with waiting(_EXCHANGE):
            for peer in self._peers:
                start, length = spans[peer.rank]
                in_message = length <= _IN_MESSAGE
                word = self._hear(peer, length if in_message else 0)
                call, offset, laid = _WORD.unpack_from(word)
                if (call, laid) != (self._calls, length):
                    self._refuse(peer, call, laid, length)
                if not length:
                    continue
                if in_message:
                    content[start : start + length] = memoryview(word)[_WORD.size :]
                else:
                    _read(peer.file, content[start : start + length], offset)
        self._laid = [one for one in self._laid if one.call == self._calls]

    def _collected(self, mine: Tensor, count: int) -> Tensor:
        everyone = mine.new_empty(count, *mine.shape)
        if count:
            everyone[self._rank] = mine
        size = mine.nbytes if count else 0
        self.take(everyone, [(rank * size, size) for rank in range(self._size)])
        return everyone

    def _lay(self, content: memoryview, spans: Sequence[Span], listeners: Sequence[Peer] | None = None) -> None:
        """Send each peer, or `listeners`, its span of the bytes.

        Where one is long, all bytes are written to a region that no peer may still be reading.
        """
        self._calls += 1
        collective(_EXCHANGE)
        listeners = self._peers if listeners is None else listeners
        begin = 0
        if any(spans[peer.rank][1] > _IN_MESSAGE for peer in listeners):
            begin = self._room_for(len(content))
            _write(self._file, content, begin)
            self._laid.append(_Laid(begin, begin + len(content), self._calls))
        for peer in listeners:
            start, length = spans[peer.rank]
            word = _WORD.pack(self._calls, begin + start, length)
            peer.line.send(word + content[start : start + length] if 0 < length <= _IN_MESSAGE else word)

    def _room_for(self, size: int) -> int:
        """Return the first offset with a free region of `size` bytes."""
        begin = 0
        for one in sorted(self._laid):
            if begin + size <= one.start:
                break
            begin = one.stop
        return begin

    def _hear(self, peer: Peer, length: int) -> bytes:
        """Wait for a peer's message with `length` bytes of rows, and return it."""
        try:
            word = peer.line.recv(_WORD.size + length)
        except BlockingIOError as error:
            message = f"rank {peer.rank} sent nothing for exchange {self._calls}: timed out"
            raise TimeoutError(message) from error
        if not word:
            message = f"rank {peer.rank}: connection closed by peer"
            raise ConnectionResetError(message)
        return word

    def _refuse(self, peer: Peer, call: int, laid: int, length: int) -> NoReturn:
        message = (
            f"rank {peer.rank} sends {laid} bytes in exchange {call}, this rank expects {length} in exchange "
            f"{self._calls}: the two do not run the same case"
        )
        raise RuntimeError(message)


class _Arriving:
    """See `Underway`."""

    def __init__(self, memory: SharedMemory, incoming: Tensor, spans: Sequence[Span]) -> None:
        self._memory, self._incoming, self._spans = memory, incoming, spans

    def wait(self) -> None:
        """See `Underway.wait`."""
        self._memory.take(self._incoming, self._spans)


@lru_cache(maxsize=64)
def _spans(counts: tuple[int, ...], row_bytes: int) -> list[Span]:
    lengths = [count * row_bytes for count in counts]
    return list(zip(accumulate(lengths, initial=0), lengths, strict=False))  # the last sum is the end


def _write(file: int, content: memoryview, start: int) -> None:
    while len(content):
        written = os.pwrite(file, content, start)
        content, start = content[written:], start + written


def _read(file: int, place: memoryview, start: int) -> None:
    while len(place):
        count = os.preadv(file, [place], start)
        if not count:
            message = f"shared memory: {len(place)} bytes at {start} are not there"
            raise RuntimeError(message)
        place, start = place[count:], start + count
