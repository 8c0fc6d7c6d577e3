"""Rendezvous of the ranks of one host: a socket to each peer, and its memory file with rows.

No name is left behind: sockets are bound to names that the kernel chooses and frees, and files are memfds, passed
between processes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
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
_SECONDS = struct.Struct("@ll")
_WORD_BYTES = 8

Everyones = Callable[[Tensor], Tensor]
"""All-gather of rows: int64 [W, c] from each rank's [c]. Collective."""


class Peer(NamedTuple):
    """Another rank of this host: a message-preserving socket to it, and its file."""

    rank: int
    line: socket.socket
    file: int


class Neighbours(NamedTuple):
    """This rank, its own file, and the group's other ranks in ring order, starting with the next."""

    rank: int
    file: int
    peers: list[Peer]


class _Door(NamedTuple):
    """A rank's listening socket, its name, and the file that callers receive."""

    socket: socket.socket
    name: int
    file: int


def find_neighbours(rank: int, everyones: Everyones, timeout_s: float, *, willing: bool = True) -> Neighbours | None:
    """Connect to all other ranks of a group; return None on every rank if any pair cannot connect. Collective.

    Ranks can connect if all are willing and share one Linux, one user, one PID namespace and one network namespace. A
    wait for a peer times out after `timeout_s`.
    """
    with contextlib.ExitStack() as opened:
        door = _open_door(opened) if willing else None
        cards = everyones(torch.tensor([_place(), 0 if door is None else door.name])).tolist()
        if door is None or any(place != cards[0][0] or not name for place, name in cards):
            return None
        called = _call(opened, door, rank, [name for _, name in cards[:rank]])
        if bool(everyones(torch.tensor([int(called is None)])).any()) or called is None:
            return None
        peers = [_heard(line) for line in called]
        peers += [_answer(opened, door, rank) for _ in cards[rank + 1 :]]
        for peer in peers:
            peer.line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SECONDS.pack(int(timeout_s) + 1, 0))
        door.socket.close()
        opened.pop_all()
    return Neighbours(rank, door.file, sorted(peers, key=lambda peer: (peer.rank < rank, peer.rank)))


def _open_door(opened: contextlib.ExitStack) -> _Door | None:
    try:
        file = os.memfd_create("distbench-rows")
        opened.callback(os.close, file)
        listening = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listening.bind("")
        listening.listen(socket.SOMAXCONN)
        name: bytes = listening.getsockname()
    except (OSError, AttributeError):
        return None
    return _Door(listening, int.from_bytes(name[1:], "little"), file)


def _call(opened: contextlib.ExitStack, door: _Door, rank: int, names: list[int]) -> list[socket.socket] | None:
    """Connect to the lower ranks by their sockets' names; None if one is unreachable."""
    lines = []
    try:
        for name in names:
            line = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            line.connect(b"\0" + name.to_bytes(_WORD_BYTES, "little").rstrip(b"\0"))
            socket.send_fds(line, [_HELLO.pack(rank)], [door.file])
            lines.append(line)
    except OSError:
        return None
    return lines


def _answer(opened: contextlib.ExitStack, door: _Door, rank: int) -> Peer:
    """Accept the next rank's connection, whose first message is waiting already; ignore those of other users."""
    while True:
        line = door.socket.accept()[0]
        credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] == os.geteuid():
            opened.enter_context(line)
            socket.send_fds(line, [_HELLO.pack(rank)], [door.file])
            return _heard(line)
        line.close()


def _heard(line: socket.socket) -> Peer:
    word, files, _, _ = socket.recv_fds(line, _HELLO.size, 1)
    if not word:
        message = "connection closed by peer while ranks of one host looked for each other"
        raise ConnectionResetError(message)
    if not files:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    (rank,) = _HELLO.unpack(word)
    return Peer(rank, line, files[0])


def _place() -> int:
    """Return an identifier shared by processes that can find and reach each other."""
    try:
        network = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        network = ""
    digest = hashlib.blake2b(f"{pid_space()}/{network}/{os.geteuid()}".encode(), digest_size=_WORD_BYTES).digest()
    return int.from_bytes(digest, "little", signed=True)
