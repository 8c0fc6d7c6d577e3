"""Rendezvous of the ranks of one host: a socket to each peer, its memory file with rows, and its eventfds.

No name is left behind: sockets are bound to names that the kernel chooses and frees, and files are memfds, passed
between processes with the eventfds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.utils.process import pid_space

_HELLO = struct.Struct("<q")
_CREDENTIALS = struct.Struct("3i")
EVENTS = 3
"""Eventfds of a rank: semaphores that do not block."""
_WORD_BYTES = 8

Everyones = Callable[[Tensor], Tensor]
"""All-gather of rows: int64 [W, c] from each rank's [c]. Collective."""


class Peer(NamedTuple):
    """Another rank of this host: a socket to it, which carries nothing until it closes, its file and its eventfds.

    `memory` is the beginning of the file.
    """

    rank: int
    line: socket.socket
    file: int
    events: list[int]
    memory: memoryview


class Neighbours(NamedTuple):
    """This rank, what a `Peer` has of its own, and the group's other ranks in ring order, starting with the next."""

    rank: int
    file: int
    events: list[int]
    memory: memoryview
    peers: list[Peer]


class _Door(NamedTuple):
    """A rank's listening socket, its name, and the files that callers receive: the memory file, then the eventfds."""

    socket: socket.socket
    name: int
    files: list[int]


def find_neighbours(rank: int, everyones: Everyones, size: int, *, willing: bool = True) -> Neighbours | None:
    """Connect to all other ranks of a group; return None on every rank if any pair cannot connect. Collective.

    Ranks can connect if all are willing and share one Linux, one user, one PID namespace and one network namespace.
    The first `size` bytes of each file are mapped; no rank can shrink it.
    """
    with contextlib.ExitStack() as opened:
        door = _open_door(opened, size) if willing else None
        cards = everyones(torch.tensor([_place(), 0 if door is None else door.name])).tolist()
        if door is None or any(place != cards[0][0] or not name for place, name in cards):
            return None
        called = _call(opened, door, rank, [name for _, name in cards[:rank]])
        if bool(everyones(torch.tensor([int(called is None)])).any()) or called is None:
            return None
        peers = [_heard(line, size) for line in called]
        peers += [_answer(opened, door, rank, size) for _ in cards[rank + 1 :]]
        door.socket.close()
        opened.pop_all()
    file, *events = door.files
    memory = memoryview(mmap.mmap(file, size))
    return Neighbours(rank, file, events, memory, sorted(peers, key=lambda peer: (peer.rank < rank, peer.rank)))


def _open_door(opened: contextlib.ExitStack, size: int) -> _Door | None:
    try:
        files = [os.memfd_create("distbench-rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        opened.callback(os.close, files[0])
        os.ftruncate(files[0], size)
        fcntl.fcntl(files[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        for _ in range(EVENTS):
            files.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE))
            opened.callback(os.close, files[-1])
        listening = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listening.bind("")
        listening.listen(socket.SOMAXCONN)
        name: bytes = listening.getsockname()
    except (OSError, AttributeError):
        return None
    return _Door(listening, int.from_bytes(name[1:], "little"), files)


def _call(opened: contextlib.ExitStack, door: _Door, rank: int, names: list[int]) -> list[socket.socket] | None:
    """Connect to the lower ranks by their sockets' names; None if one is unreachable."""
    lines = []
    try:
        for name in names:
            line = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            line.connect(b"\0" + name.to_bytes(_WORD_BYTES, "little").rstrip(b"\0"))
            socket.send_fds(line, [_HELLO.pack(rank)], door.files)
            lines.append(line)
    except OSError:
        return None
    return lines


def _answer(opened: contextlib.ExitStack, door: _Door, rank: int, size: int) -> Peer:
    """Accept the next rank's connection, whose first message is waiting already; ignore those of other users."""
    while True:
        line = door.socket.accept()[0]
        credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] == os.geteuid():
            opened.enter_context(line)
            socket.send_fds(line, [_HELLO.pack(rank)], door.files)
            return _heard(line, size)
        line.close()


def _heard(line: socket.socket, size: int) -> Peer:
    word, files, _, _ = socket.recv_fds(line, _HELLO.size, 1 + EVENTS)
    if not word:
        message = "connection closed by peer while ranks of one host looked for each other"
        raise ConnectionResetError(message)
    if len(files) != 1 + EVENTS:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    (rank,) = _HELLO.unpack(word)
    return Peer(rank, line, files[0], files[1:], memoryview(mmap.mmap(files[0], size)))


def _place() -> int:
    """Return an identifier shared by processes that can find and reach each other."""
    try:
        network = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        network = ""
    digest = hashlib.blake2b(f"{pid_space()}/{network}/{os.geteuid()}".encode(), digest_size=_WORD_BYTES).digest()
    return int.from_bytes(digest, "little", signed=True)
