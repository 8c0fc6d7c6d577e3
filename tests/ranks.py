"""Real gloo ranks for tests: one pool of processes per number of ranks, started once, which call functions."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import secrets
import socket
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any

from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.session import Session

_TIMEOUT_S = 300.0
RankFunction = Callable[..., Any]


class RankPool:
    """`world_size` ranks, each with an open session."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distbench.launcher.worker"])
        port = _free_port()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            self._connections.append(mine)
            self._processes.append(process)

    def run(self, function: RankFunction, *arguments: object) -> list[Any]:
        """Call `function(session, *arguments)` on every rank and return the results by rank."""
        for connection in self._connections:
            connection.send((function, arguments))
        replies: dict[int, Any] = {}
        errors: list[str] = []
        while len(replies) < len(self._connections) and not errors:
            waiting = [rank for rank in range(len(self._connections)) if rank not in replies]
            ready = wait([self._connections[rank] for rank in waiting], _TIMEOUT_S)
            for rank in waiting:
                if not ready or self._connections[rank] in ready:
                    failed, replies[rank] = self._reply(self._connections[rank])
                    errors += [replies[rank]] if failed else []
        if errors:  # ranks without an answer wait for the failed rank
            self.close()
            raise AssertionError("\n".join(errors))
        return [replies[rank] for rank in range(len(self._connections))]

    def close(self) -> None:
        """End the ranks; the pool is not used again."""
        for process in self._processes:
            process.kill()
        _pool.cache_clear()

    def _reply(self, connection: Connection) -> tuple[bool, Any]:
        if not connection.poll():
            return True, "a rank gave no answer"
        try:
            reply: tuple[bool, Any] = connection.recv()
        except EOFError:
            return True, "a rank died"
        return reply


def on_ranks(world_size: int, function: RankFunction, *arguments: object) -> list[Any]:
    """Call `function(session, *arguments)` on `world_size` ranks; a module-level function, picklable arguments."""
    return _pool(world_size).run(function, *arguments)


@cache
def _pool(world_size: int) -> RankPool:
    pool = RankPool(world_size)
    atexit.register(pool.close)
    return pool


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    session = Session(Heartbeat(None), _TIMEOUT_S)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            session.enter(world_size)  # a function before may have left the ranks in a smaller group
            connection.send((False, function(session, *arguments)))
        except Exception:  # noqa: BLE001 - the test that asked gets to see it
            connection.send((True, f"rank {rank}: {traceback.format_exc()}"))


def _free_port() -> int:
    """Free port outside the ephemeral range, which connections of other pools use."""
    while True:
        port = secrets.choice(range(20_000, 30_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
