"""What one process records of its dispatches: the part that runs in a step. It enqueues copies and waits for none."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from distbench.capture.hidden_buffers import Hidden, Room, kind_of, make_rooms
from distbench.capture.host_buffers import Buffers, make_buffers
from distbench.capture.settings import Place, Settings, tell
from distbench.capture.writer import Files, Missed, Taken, Writer

_MOST_LAYERS = 4096


class Dispatch(NamedTuple):
    """One dispatch as a hook hands it over: ids [n, k] and weights [n, k] as sent, total_recv on the device.

    `limit` is the number of rows of the cut that follows, 0 for none. `place` is called once, for the first dispatch,
    and gives the rank and the most tokens that it may send as well. `hidden` are the hidden states as sent, where
    `Recorder.keeps_tensors` asks for them.
    """

    ids: Tensor
    weights: Tensor
    total_recv: Tensor
    limit: int
    place: Callable[[], tuple[Place, int]]
    hidden: Hidden | None = None


class Recorder:
    """The capture of a process. An error ends the capture, with a line on standard error, and never the process."""

    def __init__(self, settings: Settings, source: str) -> None:
        self._settings = settings
        self._source = source
        self._layers: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
        self._layers_seen = 0
        self._writer: Writer | None = None
        self._missed = Missed()
        self._free: deque[Buffers] = deque()
        self._rooms: deque[Room] | None = None
        self._most_rows = 0
        self.keeps_tensors = settings.most_tensor_bytes > 0
        self._lock = threading.Lock()
        self.ended = False

    def see(self, dispatcher: Any, dispatch: Callable[[], Dispatch]) -> None:
        """Record a dispatch by `dispatcher`, whose calls count the steps of its layer, if its step is one to record."""
        if self.ended:
            return
        try:
            place = self._layers.get(dispatcher)
            if place is None:
                place = self._new_layer(dispatcher)
            layer, step = place
            place[1] = step + 1
            if self._settings.violations or step % self._settings.every == 0:
                self._take(step, layer, dispatch())
        except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on without a capture
            self.end(f"{type(error).__name__}: {error}")

    def end(self, reason: str = "") -> None:
        """Write what is left, and record nothing from now on; `reason` says what went wrong."""
        with self._lock:
            if self.ended:
                return
            self.ended = True
        if reason:
            tell(f"ended, the server goes on: {reason}")
        if self._writer is not None:
            self._writer.close(reason)

    def _new_layer(self, dispatcher: Any) -> list[int]:
        if self._layers_seen >= _MOST_LAYERS:
            message = f"more than {_MOST_LAYERS} dispatchers: they are none of layers that stay"
            raise RuntimeError(message)
        self._layers_seen += 1
        return self._layers.setdefault(dispatcher, [self._layers_seen - 1, 0])

    def _take(self, step: int, layer: int, dispatch: Dispatch) -> None:
        ids = dispatch.ids
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            self._missed.in_graphs += 1  # its replays never come here; and nothing may be allocated now
            return
        writer = self._writer or self._start(dispatch)
        if not self._free:
            self._missed.behind += 1
            return
        room, count = self._free.popleft(), len(ids)
        room.ids[:count].copy_(ids, non_blocking=True)
        room.total_recv.copy_(dispatch.total_recv, non_blocking=True)
        if room.weights is not None:
            room.weights[:count].copy_(dispatch.weights, non_blocking=True)
        hidden = self._take_hidden(dispatch.hidden, count) if self.keeps_tensors else None
        done = None
        if ids.is_cuda:
            done = torch.cuda.Event()
            done.record()
        writer.put(Taken(step, layer, count, room, self._settings.limit or dispatch.limit, done, hidden))

    def _take_hidden(self, sent: Hidden | None, tokens: int) -> Room | None:
        """Enqueue the copies of the hidden states of `tokens` tokens; None where there is no room, which is counted."""
        if sent is None or not kind_of(sent) or len(sent[0]) != tokens:
            if not self._missed.tensors_unlike:
                told = "unknown" if sent is None else f"{sent[0].dtype} with scales {getattr(sent[1], 'dtype', None)}"
                tell(f"hidden states are not recorded: {told}; known are bf16, and fp8 with a scale per 128 columns")
            self._missed.tensors_unlike += 1
            return None
        if self._rooms is None:
            self._rooms = make_rooms(sent, self._most_rows, self._settings.most_tensor_bytes)
            assert self._writer is not None  # noqa: S101 - _take
            self._writer.rooms = self._rooms
        if not self._rooms:
            self._missed.tensors_behind += 1
            return None
        room = self._rooms.popleft()
        if not room.begin(sent):
            self._rooms.append(room)
            self._missed.tensors_unlike += 1
            return None
        return room

    def _start(self, dispatch: Dispatch) -> Writer:
        (place, most), weighed = dispatch.place(), self._settings.weights
        self._most_rows = rows = max(most, len(dispatch.ids))
        self._free = make_buffers(rows, place.topk, weighed=weighed, pinned=dispatch.ids.is_cuda)
        files = Files(self._settings, place, self._source, dispatch.ids.device)
        self._writer = Writer(files, self._free, self._missed, self.end)
        return self._writer
