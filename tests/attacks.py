"""Unauthenticated peers at node 0's port, over loopback: random, oversized, slow, forged, replayed messages."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections import deque
from collections.abc import Callable

from distbench.launcher.nodes.proof import ANSWER_BYTES, CHALLENGE_BYTES, MAGIC

LOOPBACK = "127.0.0.1"
# Idle connections that stay open while others connect; more than node 0 keeps.
_HELD = 150
_RESET = struct.pack("ii", 1, 0)
# A message that older releases accepted: node 1 reports that its rank was killed.
FORGED_EXIT = (
    b'{"node":1,"nodes":2,"nproc":1,"host":"other","launch":1,"ended":true,"exit":{"rank":1,"how":"SIGKILL"}}\n'
)

Kind = Callable[[random.Random], bytes]


def _answer(rng: random.Random) -> bytes:
    return MAGIC + rng.randbytes(ANSWER_BYTES - len(MAGIC))


KINDS: dict[str, Kind] = {
    "random": lambda rng: rng.randbytes(rng.randint(1, 4000)),
    "forged exit": lambda _: FORGED_EXIT,
    "oversized": lambda rng: rng.randbytes(64) * 2048,
    "oversized, begun well": lambda rng: (MAGIC + rng.randbytes(64)) * 1024,
    "forged proof": _answer,
    "forged proof, then a beat": lambda rng: _answer(rng) + struct.pack(">I", 100) + FORGED_EXIT,
    "no proof": lambda rng: _answer(rng)[:CHALLENGE_BYTES] + bytes(ANSWER_BYTES - CHALLENGE_BYTES),
    "slow": lambda _: b"",
    "slow, begun well": lambda rng: MAGIC[: rng.randint(1, len(MAGIC))],
    "gone": lambda _: b"",
}


def attack(port: int, count: int, seed: int = 0, recorded: bytes = b"") -> int:
    """Make `count` connections to a port of this machine, with a message of each kind in turn; return how many.

    The count is lower if node 0 ends before. `recorded` is the proof of the secret that a node sent in another session.
    """
    rng = random.Random(seed)
    kinds = KINDS | ({"replayed": lambda _: recorded} if recorded else {})
    names = list(kinds)
    held: deque[socket.socket] = deque()
    for number in range(count):
        name = names[number % len(names)]
        # A local port stays occupied for a minute after its connection has ended.
        try:
            connection = socket.create_connection((LOOPBACK, port), timeout=20, source_address=(_side(number), 0))
        except ConnectionError:
            count = number
            break
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        with contextlib.suppress(OSError):
            connection.sendall(kinds[name](rng))
        if name.startswith("slow"):
            held.append(connection)
        else:
            if name != "gone":
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass
            connection.close()
        if len(held) > _HELD:
            held.popleft().close()
    for connection in held:
        connection.close()
    return count


def _side(number: int) -> str:
    return f"127.0.1.{number % 8 + 1}"
