"""Processes that a launcher starts on nodes, and their termination on both sides."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from distbench.errors import InvalidCase
from distbench.tools.cluster.launchers import command_on

# Grace period of a command after its stdin EOF, while its ranks end first; then its launcher is terminated.
_PARTING_S = 15.0
_GRACE_S = 5.0
_POLL_S = 0.05
_TAIL_BYTES = 4096
_SHOWN_CHARACTERS = 200


class Processes:
    """One process per node. Their standard input stays open for as long as they are to run (utils/signals.py)."""

    def __init__(self, launcher: Sequence[str], folder: Path) -> None:
        """Start with `launcher`, as command_on takes it; a node's output goes to NODE.log in `folder`."""
        self._launcher = launcher
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Start a command on each node.

        Raises:
            InvalidCase: the launcher is not installed here.

        """
        for node, command in commands.items():
            with self._log(node).open("wb") as log:
                self._running[node] = _start(command_on(self._launcher, node, command), log.fileno())

    @property
    def codes(self) -> dict[str, int | None]:
        """Exit codes of the launchers, None while running."""
        return {node: process.poll() for node, process in self._running.items()}

    def let_go(self) -> None:
        """Close the commands' standard input, so that they end by themselves; does not wait."""
        for process in self._running.values():
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()

    def end(self) -> None:
        """End the remaining processes, here and on the nodes."""
        self.let_go()
        if not self._ended(_PARTING_S):
            for process in self._running.values():
                process.terminate()
            self._ended(_GRACE_S)
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def last_line(self, node: str) -> str:
        """Last line of a node's output, cut short."""
        with self._log(node).open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = log.read().decode(errors="replace").split("\n")
        told = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return told if len(told) <= _SHOWN_CHARACTERS else f"{told[: _SHOWN_CHARACTERS - 1]}…"

    def _log(self, node: str) -> Path:
        return self._folder / f"{node}.log"

    def _ended(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while None in self.codes.values():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


def _start(command: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    try:
        process = subprocess.Popen(  # noqa: S603 - the user's own launcher, and no shell
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        message = f"launcher {command[0]!r}: {error.strerror}; name one that is installed here"
        raise InvalidCase(message) from error
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
            process.stdin.flush()
    return process
