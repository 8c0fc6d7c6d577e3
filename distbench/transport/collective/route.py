"""Consequences of a rank's routing: rows that leave, stay and arrive, and the byte layout of a row in transit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distbench.transport.base import poison_
from distbench.transport.collective.arrival import RowCounts

# Alignment of a row's fields and of its length: whole transactions of a device's memory.
_FIELD_BYTES, _ROW_BYTES = 16, 128
_TELLING_COLUMNS = 8


class Lane(NamedTuple):
    """One field of the rows in transit, as words: views of rows that leave, of all received, and of the buffer.

    Received rows are first those from peers, by rank and token, then the rank's own, `staying`.
    """

    leaving: Tensor
    incoming: Tensor
    staying: Tensor
    buffer: Tensor


class Route(NamedTuple):
    """The route of a rank's ids [n, k].

    `given` is the tensor that held the ids, `ids` a copy. `leaving` and `staying` int64 are the tokens of the rows sent
    to peers and kept, by rank and token. position int64 [n, W] is the row that went to a rank; the number of sent rows
    means none. `outgoing` and `incoming` are uint8 [rows, row bytes], the leaving and all received rows; `lanes` are
    their fields. `numbers` int32 [received] are the token numbers in `incoming`. Of both, `from_peers` and
    `peers_numbers` are those that peers send.
    """

    given: Tensor
    ids: Tensor
    leaving: Tensor
    staying: Tensor
    position: Tensor
    outgoing: Tensor
    incoming: Tensor
    from_peers: Tensor
    numbers: Tensor
    peers_numbers: Tensor
    lanes: list[Lane]


class DispatchState(NamedTuple):
    """State of one dispatch until its combine: its route, and its order of the receive buffer (`Order`)."""

    route: Route
    slots: Tensor
    own_slots: Tensor
    rows: Tensor


class Mover(Protocol):
    """Moves and adds one rank's rows on its device. All movers give the same bits, and none waits for the device.

    Before an exchange it poisons the rows that peers will send: enough of each to recognise one that did not arrive.
    """

    name: str

    def leave(self, parts: Sequence[Tensor], route: Route) -> None:
        """Copy the leaving rows into `route.outgoing`; parts [n, .] are the batch's fields, as words."""

    def stay(self, parts: Sequence[Tensor], plan: DispatchState) -> None:
        """Move the rank's own rows as far as possible while the others travel.

        After `leave` and `stay`, the rows that the last combine received are poison.
        """

    def arrive(self, plan: DispatchState, total_recv: Tensor) -> None:
        """Copy all received rows into their slots, and write their number to total_recv [1]."""

    def send_back(self, expert_out: Tensor, plan: DispatchState) -> Tensor:
        """Return the expert rows that go back to peers, as bytes; a row past the end of expert_out is poison.

        The token numbers of the rows that peers have sent become poison.
        """

    def room(self, expert_out: Tensor) -> Tensor:
        """Return memory for the rows that peers return, as bytes; poison before its first use."""

    def stay_back(self, expert_out: Tensor, plan: DispatchState) -> None:
        """Copy the rank's own rows to the place where `add` reads them."""

    def add(self, expert_out: Tensor, plan: DispatchState, slots: Tensor) -> Tensor:
        """Add each token's rows in order, from +0.0, in float32, with one rounding: [n, H].

        slots int64 [n, c]: the index of a row as sent; the number of sent rows means poison, one more means no row.
        """


class Layout(NamedTuple):
    """Byte offsets of a row's fields: `spans` (start, stop); the token's number starts at `number`."""

    spans: list[tuple[int, int]]
    number: int
    row_bytes: int


def lay_out(fields: Sequence[Tensor]) -> Layout:
    """Layout of fields [., columns] in a row in transit."""
    spans, start = [], 0
    for field in fields:
        stop = start + field.shape[1] * field.element_size()
        spans.append((start, stop))
        start = _aligned(stop, _FIELD_BYTES)
    return Layout(spans, start, _aligned(start + _FIELD_BYTES, _ROW_BYTES))


def lanes_of(
    layout: Layout, buffers: Sequence[Tensor], outgoing: Tensor, incoming: Tensor, arriving: int
) -> list[Lane]:
    """Return each field of the outgoing and incoming rows, uint8 [rows, row bytes], and of its receive buffer.

    The first `arriving` of the incoming rows are those from peers.
    """
    lanes = []
    for buffer, (start, stop) in zip(buffers, layout.spans, strict=True):
        target = words(buffer)
        leaving, received = (rows[:, start:stop].view(target.dtype) for rows in (outgoing, incoming))
        lanes.append(Lane(leaving, received, received[arriving:], target))
    return lanes


def sent_rows(going: Tensor, traffic: RowCounts) -> tuple[Tensor, Tensor]:
    """Return the tokens of the rows sent, int64 [s], own last, and the row of each token and rank, int64 [n, W].

    going bool [n, W]: the destination ranks of each token.
    """
    rank = traffic.rank
    ordered = going.t()
    ordered = torch.cat([ordered[:rank], ordered[rank + 1 :], ordered[rank : rank + 1]])
    tokens = ordered.nonzero()[:, 1]
    position = torch.where(ordered, ordered.flatten().cumsum(0).view_as(ordered) - 1, tokens.numel())
    return tokens, torch.cat([position[:rank], position[-1:], position[rank:-1]]).t().contiguous()


class Room:
    """Memory for the rows of one step, reused between calls.

    `rows` are all of them. Of those that travel, the first, `wire` are the bytes and `telling` the first columns,
    enough to recognise a row that did not arrive.
    """

    rows: Tensor
    wire: Tensor
    telling: Tensor | None = None

    def __init__(self, travelling: int, others: int = 0) -> None:
        self._travelling, self._size = travelling, travelling + others

    def of(self, like: Tensor) -> bool:
        """Have rows of like's width and dtype: the previous ones, or new ones filled with poison. Whether new."""
        if self.telling is not None and self.rows.shape[1] == like.shape[1] and self.rows.dtype == like.dtype:
            return False
        rows = self.rows = like.new_empty(self._size, like.shape[1])
        poison_(rows)
        self.wire = rows[: self._travelling].view(torch.uint8)
        self.telling = rows[: self._travelling, :_TELLING_COLUMNS]
        return True


def words(rows: Tensor) -> Tensor:
    """View rows as the widest integers that divide them."""
    size = rows.shape[1] * rows.element_size()
    return rows.view(next(word for word in (torch.int64, torch.int32, torch.uint8) if size % word.itemsize == 0))


def _aligned(size: int, unit: int) -> int:
    return -(-size // unit) * unit
