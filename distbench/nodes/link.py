"""The side of the nodes other than node 0."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import msgspec

from distbench.errors import DistbenchError, InvalidCase
from distbench.job import Spread
from distbench.nodes.wire import SILENCE_S, Beat, Order

_RETRY_S = 0.5


class NodeLost(DistbenchError):
    """Node 0 is gone, or was never there. Not a verdict: that is node 0's to give."""

    label = "NODE_LOST"
    exit_code = 3


class Link:
    """The connection to node 0."""

    def __init__(self, spread: Spread, seconds: float, signals: Sequence[int]) -> None:
        """Connect, trying for `seconds`, since node 0 may come up later.

        Raises:
            NodeLost: node 0 does not answer.

        """
        self._name = f"node 0 at {spread.endpoint}"
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._socket = socket.create_connection((spread.host, spread.port), timeout=SILENCE_S)
                break
            except OSError as error:
                if signals or time.monotonic() > deadline:
                    message = f"{self._name} did not answer within {seconds:.0f} s: {error}; see --join-timeout"
                    raise NodeLost(message) from error
                time.sleep(_RETRY_S)
        self._file = self._socket.makefile("rb")

    def tell(self, beat: Beat) -> Order:
        """Tell node 0 how this node stands, and return what it wants.

        Raises:
            NodeLost: no answer.
            InvalidCase: this node cannot take part.

        """
        try:
            self._socket.sendall(msgspec.json.encode(beat) + b"\n")
            line = self._file.readline()
        except OSError as error:
            message = f"{self._name} no longer answers: {error}"
            raise NodeLost(message) from error
        if not line:
            message = f"{self._name} has gone"
            raise NodeLost(message)
        order = msgspec.json.decode(line, type=Order)
        if order.refused:
            raise InvalidCase(order.refused)
        return order

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()
