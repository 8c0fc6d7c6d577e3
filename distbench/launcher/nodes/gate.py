"""Admission to node 0: connections whose peers prove the secret are handed over, all others are refused.

One thread holds at most MOST_PEERS unproven connections, each for PROOF_S and with room for one answer, so that
strangers can exhaust neither memory nor threads. Beyond that number the oldest connection is dropped.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from distbench.launcher.nodes.proof import ANSWER_BYTES, MAGIC, REFUSED, Channel, WrongSecret, challenge, check_answer
from distbench.launcher.nodes.protocol import SILENCE_S
from distbench.launcher.nodes.refusals import Refusals

MOST_PEERS = 64
PROOF_S = 5.0

_TICK_S = 0.25
_OUT_OF_FILES_S = 0.05

Welcome = Callable[[Channel, str], None]
"""Takes a channel to a peer that knows the secret, and the peer's address, in a thread of its own."""


class Gate(threading.Thread):
    """Accepts connections until it is closed."""

    def __init__(self, listeners: Sequence[socket.socket], secret: bytes, welcome: Welcome, refusals: Refusals) -> None:
        """Take over listening sockets; start() begins to accept."""
        super().__init__(name="gate", daemon=True)
        self._listeners = listeners
        self._secret = secret
        self._welcome = welcome
        self._refusals = refusals
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, _Peer] = {}  # the oldest first
        self._closing = threading.Event()

    def run(self) -> None:
        """Accept, receive answers, and refuse peers that exceed PROOF_S."""
        for listener in self._listeners:
            listener.settimeout(0)
            self._selector.register(listener, selectors.EVENT_READ)
        while not self._closing.is_set():
            for key, _ in self._selector.select(_TICK_S):
                found = key.fileobj
                assert isinstance(found, socket.socket)  # noqa: S101 - tells mypy
                peer = self._peers.get(found)
                if peer is not None:
                    self._hear(peer)
                elif found in self._listeners:
                    self._accept(found)
            now = time.monotonic()
            for peer in [peer for peer in self._peers.values() if now > peer.deadline]:
                self._refuse(peer, f"did not prove the secret within {PROOF_S:g} s")
        for peer in list(self._peers.values()):
            self._drop(peer)
        for listener in self._listeners:
            listener.close()
        self._selector.close()

    def close(self) -> None:
        """Accept no more, and wait until the sockets are closed."""
        self._closing.set()
        self.join()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, address = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # gone again, or no descriptor left
            time.sleep(_OUT_OF_FILES_S)
            return
        if len(self._peers) >= MOST_PEERS:
            self._refuse(next(iter(self._peers.values())), f"made room: {MOST_PEERS} peers were unproven")
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        peer = _Peer(connection, f"{host}:{address[1]}")
        connection.settimeout(0)
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)
        if not peer.send(peer.asked):
            self._refuse(peer, "does not receive")

    def _hear(self, peer: _Peer) -> None:
        try:
            block = peer.connection.recv(ANSWER_BYTES - len(peer.answer))
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(peer, f"disconnected before it proved the secret: {error.strerror}")
            return
        peer.answer += block
        if not block:
            self._refuse(peer, "disconnected before it proved the secret")
        elif not MAGIC.startswith(peer.answer[: len(MAGIC)]):
            self._refuse(peer, "speaks another protocol")
        elif len(peer.answer) == ANSWER_BYTES:
            self._judge(peer)

    def _judge(self, peer: _Peer) -> None:
        try:
            proof, keys = check_answer(self._secret, peer.asked, bytes(peer.answer))
        except WrongSecret:
            peer.send(REFUSED)
            self._refuse(peer, "has another secret, or none")
            return
        if not peer.send(proof):
            self._refuse(peer, "does not receive")
            return
        self._forget(peer)
        peer.connection.settimeout(SILENCE_S)
        channel = Channel(peer.connection, sending=keys.down, receiving=keys.up)
        threading.Thread(target=self._welcome, args=(channel, peer.name), name="node", daemon=True).start()

    def _refuse(self, peer: _Peer, why: str) -> None:
        self._refusals.note(peer.name, why)
        self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self._forget(peer)
        peer.connection.close()

    def _forget(self, peer: _Peer) -> None:
        del self._peers[peer.connection]
        with contextlib.suppress(KeyError):
            self._selector.unregister(peer.connection)


class _Peer:
    """A connection whose other side has not proven the secret."""

    __slots__ = ("answer", "asked", "connection", "deadline", "name")

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection = connection
        self.name = name
        self.asked = challenge()
        self.answer = bytearray()
        self.deadline = time.monotonic() + PROOF_S

    def send(self, content: bytes) -> bool:
        """Whether a few bytes were sent at once, as they are on an idle connection."""
        try:
            return self.connection.send(content) == len(content)
        except OSError:
            return False
