"""Connection of the other nodes to node 0."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import msgspec

from distbench.errors import DistbenchError, InvalidCase
from distbench.launcher.job import NodeLayout
from distbench.launcher.nodes.proof import Channel, Tampered, WrongSecret, prove
from distbench.launcher.nodes.protocol import MOST_ORDER_BYTES, SILENCE_S, Beat, Order
from distbench.launcher.nodes.secret import VARIABLE
from distbench.report.progress import Meter

_RETRY_S = 0.5


class NodeLost(DistbenchError):
    """Node 0 is gone, or was never there. Not a verdict: node 0 decides that."""

    label = "NODE_LOST"
    exit_code = 3


class Client:
    """The connection to node 0."""

    def __init__(self, layout: NodeLayout, secret: bytes, seconds: float, signals: Sequence[int]) -> None:
        """Connect and prove the secret, retrying for `seconds`, since node 0 may start later, or have no room yet.

        Raises:
            NodeLost: node 0 does not answer.
            InvalidCase: node 0 has another secret.

        """
        self._name = f"node 0 at {layout.endpoint}"
        with Meter(f"waiting {seconds:.0f} s for {self._name}"):
            self._channel = self._connected(layout, secret, seconds, signals)

    def _connected(self, layout: NodeLayout, secret: bytes, seconds: float, signals: Sequence[int]) -> Channel:
        deadline = time.monotonic() + seconds
        while True:
            try:
                channel = _connect(layout, secret)
                break
            except (OSError, EOFError, Tampered) as error:
                if signals or time.monotonic() > deadline:
                    message = f"{self._name} did not answer within {seconds:.0f} s: {_why(error)}; see --join-timeout"
                    raise NodeLost(message) from error
                time.sleep(_RETRY_S)
            except WrongSecret as error:
                message = f"{self._name} has another secret than this node; give all nodes the same {VARIABLE}"
                raise InvalidCase(message) from error
        return channel

    def tell(self, beat: Beat) -> Order:
        """Send node 0 this node's state, and return its order.

        Raises:
            NodeLost: no answer.
            InvalidCase: this node cannot take part.

        """
        try:
            self._channel.send(msgspec.json.encode(beat))
            order = msgspec.json.decode(self._channel.receive(MOST_ORDER_BYTES), type=Order)
        except EOFError as error:
            message = f"{self._name} has gone"
            raise NodeLost(message) from error
        except (OSError, Tampered, msgspec.DecodeError) as error:
            message = f"{self._name} no longer answers: {_why(error)}"
            raise NodeLost(message) from error
        if order.refused:
            raise InvalidCase(order.refused)
        return order

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def _connect(layout: NodeLayout, secret: bytes) -> Channel:
    connection = socket.create_connection((layout.host, layout.port), timeout=SILENCE_S)
    try:
        keys = prove(connection, secret)
    except BaseException:
        connection.close()
        raise
    return Channel(connection, sending=keys.up, receiving=keys.down)


def _why(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "it disconnected"
    return f"what listens there is no node 0 ({error})" if isinstance(error, Tampered) else str(error)
