"""Rows between ranks of one host: each writes its rows to a memory file and raises an event, and reads the others'.

gloo's all-to-all has two threads of each rank pass every message through the kernel's network, a fifth of a tiny case's
time. Here an exchange takes a rank one system call to send, and one for each peer whose rows are there. Eventfds, not
flags in shared memory, signal that rows are ready: no rank spins where ranks outnumber cores, and the kernel orders
writes before reads. A dead peer shows as a closed connection.
"""

from __future__ import annotations

import os
import select
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

# Of the rows for one peer: number of the exchange, offset in the file, bytes.
_HEADER = struct.Struct("<qqq")
# Consecutive gathers that only rank 0 waits for: data for the other ranks is kept for this long.
_GATHERS_AHEAD = 3
# The beginning of each file is mapped by all ranks. Exchanges take its slots in turn: a header for each rank, then the
# rows, if they fit. A rank that begins an exchange knows that all have read the one as many before.
_SLOTS = _GATHERS_AHEAD + 2
_SLOT_ROWS = 64 << 10
# Event of a gather that only rank 0 waits for; exchanges of all take events 0 and 1 in turn.
_GATHER = 2
_EXCHANGE = "exchange in shared memory"

Span = tuple[int, int]
"""Offset and number of bytes."""


class _Laid(NamedTuple):
    """Region of an exchange that a peer may still have to read."""

    start: int
    stop: int
    call: int


def mapped_bytes(ranks: int) -> int:
    """Bytes at the beginning of each rank's file that all ranks of a group map."""
    return _SLOTS * _slot_bytes(ranks)


class SharedMemory:
    """`Exchange` through shared memory, with all-gather and gather of small tensors between ranks.

    Every rank signals every other in each exchange, even without rows for it. A rank that has finished an exchange
    therefore knows that all ranks have finished the previous ones, and may overwrite its data of those. A signal adds
    one for each peer to an eventfd of the sender, from which each takes one. Two eventfds in turn suffice: none is
    raised again before all have taken from it. Only rank 0 waits for a gather, a few in a row: tiny cases end with two.
    """

    name = "shared_memory"

    def __init__(self, neighbours: Neighbours, timeout_s: float) -> None:
        """A wait for a peer times out after `timeout_s`."""
        self._rank, self._file, self._events, self._memory, self._peers = neighbours
        self._size = len(self._peers) + 1
        self._slot_bytes, self._behind = _slot_bytes(self._size), mapped_bytes(self._size)
        self._timeout_ms = (int(timeout_s) + 1) * 1000
        self._calls = 0
        self._gathers = 0
        self._turn = 0
        self._waited_for = 0
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
        spans = [(0, mine.nbytes)] + [(0, 0)] * (self._size - 1)
        if together:
            self._lay(memory_of(mine), spans)
        else:
            self._lay(memory_of(mine), spans, [peer for peer in self._peers if peer.rank == 0], _GATHER)
        return self._collected(mine, count) if count or together else mine.new_empty(0, *mine.shape)

    def take(self, incoming: Tensor, spans: Sequence[Span]) -> None:
        """Read each rank's data for this rank into its span of `incoming`, once the rank has announced it."""
        self._take(memory_of(incoming), spans)

    def _take(self, content: memoryview, spans: Sequence[Span]) -> None:
        event, header, behind = self._waited_for, self._header_of(self._calls), self._behind
        with waiting(_EXCHANGE):
            for peer in self._peers:
                start, length = spans[peer.rank]
                try:
                    os.eventfd_read(peer.events[event])
                except BlockingIOError:
                    self._wait(peer, event, length)
                call, offset, laid = _HEADER.unpack_from(peer.memory, header)
                if call != self._calls or laid != length:
                    self._refuse(peer, length)
                if not length:
                    continue
                if offset < behind:
                    content[start : start + length] = peer.memory[offset : offset + length]
                else:
                    _read(peer.file, content[start : start + length], offset)
        if self._laid:
            self._laid = [one for one in self._laid if one.call == self._calls]

    def _collected(self, mine: Tensor, count: int) -> Tensor:
        everyone = mine.new_empty(count, *mine.shape)
        if count:
            everyone[self._rank] = mine
        size = mine.nbytes if count else 0
        self.take(everyone, [(rank * size, size) for rank in range(self._size)])
        return everyone

    def _lay(
        self,
        content: memoryview,
        spans: Sequence[Span],
        listeners: Sequence[Peer] | None = None,
        event: int | None = None,
    ) -> None:
        """Write the bytes where no peer may still be reading, and tell each peer, or `listeners`, its span.

        `event` is that of the signal; None for the next of an exchange of all ranks.
        """
        self._calls += 1
        collective(_EXCHANGE)
        if event is None:
            event = self._turn = 1 - self._turn
        self._waited_for = event
        listeners = self._peers if listeners is None else listeners
        if not listeners:
            return
        slot = self._calls % _SLOTS * self._slot_bytes
        begin, size = slot + self._size * _HEADER.size, len(content)
        if size <= _SLOT_ROWS:
            self._memory[begin : begin + size] = content
        else:
            begin = self._room_for(size)
            _write(self._file, content, begin)
            self._laid.append(_Laid(begin, begin + size, self._calls))
        for peer in listeners:
            start, length = spans[peer.rank]
            _HEADER.pack_into(self._memory, slot + peer.rank * _HEADER.size, self._calls, begin + start, length)
        os.eventfd_write(self._events[event], len(listeners))

    def _room_for(self, size: int) -> int:
        """Return the first offset behind the slots with a free region of `size` bytes."""
        begin = self._behind
        for one in sorted(self._laid):
            if begin + size <= one.start:
                break
            begin = one.stop
        return begin

    def _header_of(self, call: int) -> int:
        """Offset of a peer's header for this rank."""
        return call % _SLOTS * self._slot_bytes + self._rank * _HEADER.size

    def _wait(self, peer: Peer, event: int, length: int) -> None:
        """Wait for a peer's signal for `length` bytes, and take from it.

        Raises:
            ConnectionResetError: the peer has ended.
            TimeoutError: the time of a wait is over.
            RuntimeError: the peer is in an exchange of all ranks, where this rank waits for a gather.
        """
        poll = select.poll()
        poll.register(peer.events[event], select.POLLIN)
        poll.register(peer.line, select.POLLIN)
        if event == _GATHER:
            poll.register(peer.events[1 - self._turn], select.POLLIN)
        ready = [file for file, _ in poll.poll(self._timeout_ms)]
        try:
            os.eventfd_read(peer.events[event])
        except BlockingIOError as error:
            if peer.line.fileno() in ready:
                message = f"rank {peer.rank}: connection closed by peer"
                raise ConnectionResetError(message) from error
            if ready:
                self._refuse(peer, length)
            message = f"rank {peer.rank} sent nothing for exchange {self._calls}: timed out"
            raise TimeoutError(message) from error

    def _refuse(self, peer: Peer, length: int) -> NoReturn:
        """Refuse the peer's last exchange where this rank expects `length` bytes."""
        headers = [_HEADER.unpack_from(peer.memory, self._header_of(call)) for call in range(_SLOTS)]
        call, _, laid = max(headers)
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


def _slot_bytes(ranks: int) -> int:
    return ranks * _HEADER.size + _SLOT_ROWS


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
