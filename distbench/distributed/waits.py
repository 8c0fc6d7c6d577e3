"""Current wait of a rank, in its heartbeat: a supervisor reads it even while the rank cannot answer.

Every rank of a case enters the same collectives in the same order, so they are numbered: ranks that have entered fewer
than others are those that the others wait for. On a device a collective returns at once and the rank waits later, in
any call that needs the device next; the number is valid all the same.
"""

from __future__ import annotations

from types import TracebackType

KINDS = (
    "",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "dispatch of mori",
    "dispatch of symmetric",
    "combine of mori",
    "combine of symmetric",
    "dispatch of deepep",
    "combine of deepep",
    "construction of mori",
    "exchange in shared memory",
    "gather",
    "group creation",
    "lock of this node's compilation",
    "message of a peer",
    "rows of peers",
    "send and receive",
    "signal of a peer",
    "store of the launch",
    "this rank's device",
    "end of the launch",
)
WORDS = 5
"""Words of the heartbeat.

The rank's wait, the number and kind of the last collective entered, its device, and one more than the rank whose signal
this rank's device has waited for in vain; 0 for none.
"""
HOST = -1
"""The device of a collective on the host."""

_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_WAITING, _ENTERED, _KIND, _DEVICE, _MISSING = range(WORDS)


def no_heartbeat() -> memoryview:
    """Words of a heartbeat without a reader."""
    return memoryview(bytearray(8 * WORDS)).cast("q")


_heartbeats = [no_heartbeat()]


def write_to(words: memoryview) -> None:
    """Write this process's waits to `words` from now on."""
    words[_WAITING] = words[_ENTERED] = words[_KIND] = words[_MISSING] = 0
    words[_DEVICE] = HOST
    _heartbeats[0] = words


def begin_case(words: memoryview) -> None:
    """Restart the numbering of collectives at 1."""
    words[_ENTERED] = 0


class Waiting:
    """A context in which the rank waits for `kind`; contexts nest."""

    __slots__ = ("_before", "_kind")

    def __init__(self, kind: str) -> None:
        self._kind = _NUMBERS[kind]

    def __enter__(self) -> None:
        words = _heartbeats[0]
        self._before = words[_WAITING]
        words[_WAITING] = self._kind

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        _heartbeats[0][_WAITING] = self._before


def missed(rank: int) -> None:
    """Record that this rank's device has given up waiting for the signal of `rank`."""
    _heartbeats[0][_MISSING] = rank + 1


def waiting(kind: str) -> Waiting:
    """Context of a wait that not all ranks of the case share, or that is no collective."""
    return Waiting(kind)


def collective(kind: str, device: int = HOST) -> Waiting:
    """Number a collective that every rank of the case enters, on `device`; return the context of the wait for it.

    `device` is a tensor's `get_device()`: -1 for the host.
    """
    words = _heartbeats[0]
    words[_ENTERED] += 1
    words[_KIND] = _NUMBERS[kind]
    words[_DEVICE] = device
    return Waiting(kind)
