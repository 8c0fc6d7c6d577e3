"""Mutual proof of the launch secret, and messages authenticated by it.

Node 0 sends MAGIC and a nonce; the other node MAGIC, its own nonce, and HMAC-SHA256 of both under the secret; node 0
then proves the secret in the same way. All that follows is bound to these nonces: each message carries the HMAC of its
number and content under a key of the session and direction, so that no message can be forged, replayed, reordered or
dropped unnoticed. Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
from typing import NamedTuple

MAGIC = b"distbench nodes1"
_NONCE_BYTES = _MARK_BYTES = 32
CHALLENGE_BYTES = len(MAGIC) + _NONCE_BYTES
ANSWER_BYTES = CHALLENGE_BYTES + _MARK_BYTES
# Sent instead of node 0's own proof where this node's was wrong. An HMAC of all zeros is improbable.
REFUSED = bytes(_MARK_BYTES)

_HEADER = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")
_BLOCK_BYTES = 1 << 16


class Tampered(Exception):
    """A message that the other side did not send: too long, forged, replayed, or out of order."""


class WrongSecret(Exception):
    """The other side does not know this launch's secret."""


class Keys(NamedTuple):
    """Keys of one session: `up` for a node's messages, `down` for node 0's answers."""

    up: bytes
    down: bytes


def challenge() -> bytes:
    """Node 0's first message, bytes [CHALLENGE_BYTES]."""
    return MAGIC + secrets.token_bytes(_NONCE_BYTES)


def check_answer(secret: bytes, asked: bytes, answer: bytes) -> tuple[bytes, Keys]:
    """Node 0's own proof and the keys of the session; `answer` is bytes [ANSWER_BYTES].

    Raises:
        WrongSecret: the answer does not prove the secret.

    """
    nonces, proof = asked + answer[:CHALLENGE_BYTES], answer[CHALLENGE_BYTES:]
    if not hmac.compare_digest(proof, _mark(secret, b"node proof", nonces)):
        raise WrongSecret
    return _mark(secret, b"leader proof", nonces), _keys(secret, nonces)


def prove(connection: socket.socket, secret: bytes) -> Keys:
    """Prove the secret to node 0, verify node 0's proof, and return the keys of the session.

    Raises:
        WrongSecret: node 0 does not accept the secret, or does not know it.
        Tampered: the listener is not node 0.
        OSError, EOFError: the connection ended.

    """
    asked = receive_exactly(connection, CHALLENGE_BYTES)
    if not asked.startswith(MAGIC):
        message = "it speaks another protocol"
        raise Tampered(message)
    own = challenge()
    nonces = asked + own
    connection.sendall(own + _mark(secret, b"node proof", nonces))
    proof = receive_exactly(connection, _MARK_BYTES)
    if not hmac.compare_digest(proof, _mark(secret, b"leader proof", nonces)):
        raise WrongSecret
    return _keys(secret, nonces)


class Channel:
    """Messages over a connection whose two sides have proven the secret."""

    def __init__(self, connection: socket.socket, sending: bytes, receiving: bytes) -> None:
        """Take over the connection; the two keys are those of the session, by direction."""
        self._connection = connection
        self._sending, self._receiving = sending, receiving
        self._sent = self._received = 0

    def send(self, content: bytes) -> None:
        """Send a message.

        Raises:
            OSError: the connection ended.

        """
        mark = _mark(self._sending, _NUMBER.pack(self._sent), content)
        self._sent += 1
        self._connection.sendall(_HEADER.pack(len(content)) + mark + content)

    def receive(self, most_bytes: int) -> bytes:
        """Next message, of at most `most_bytes`.

        Raises:
            Tampered: it is longer, or not the message that the other side sent at this point.
            OSError, EOFError: the connection ended.

        """
        header = receive_exactly(self._connection, _HEADER.size + _MARK_BYTES)
        (size,) = _HEADER.unpack_from(header)
        if size > most_bytes:
            message = f"{size} bytes announced, allowed are {most_bytes}"
            raise Tampered(message)
        content = receive_exactly(self._connection, size)
        if not hmac.compare_digest(
            header[_HEADER.size :], _mark(self._receiving, _NUMBER.pack(self._received), content)
        ):
            message = "a mark that is not of this session"
            raise Tampered(message)
        self._received += 1
        return content

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Next `size` bytes; memory grows only as bytes arrive.

    Raises:
        OSError, EOFError: the connection ended before.

    """
    content = bytearray()
    while len(content) < size:
        block = connection.recv(min(size - len(content), _BLOCK_BYTES))
        if not block:
            raise EOFError
        content += block
    return bytes(content)


def _keys(secret: bytes, nonces: bytes) -> Keys:
    return Keys(up=_mark(secret, b"key up", nonces), down=_mark(secret, b"key down", nonces))


def _mark(key: bytes, label: bytes, content: bytes) -> bytes:
    """HMAC-SHA256 of a label, its length first, and content."""
    mark = hmac.new(key, _HEADER.pack(len(label)) + label, "sha256")
    mark.update(content)
    return mark.digest()
