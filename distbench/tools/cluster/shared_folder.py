"""Check that all nodes share the folder for results: each finds a word in it, and leaves a mark beside the word.

As a module it is the command of a node: `python -m distbench.tools.cluster.shared_folder FOLDER WORD NODE`.
"""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_FOLDER, _WORD = ".probe", "word"
_COMPLAINT = "distbench: probe: "
# A network folder shows files written elsewhere only after a delay.
_SHOWN_S = 5.0
_POLL_S = 0.1

RunOnNodes = Callable[[Path, Mapping[str, Sequence[str]]], None]
"""Runs a command on each node, with its output in NODE.log of the folder, until all have ended or a time limit."""


def unshared(out: Path, nodes: Sequence[str], run: RunOnNodes) -> dict[str, str]:
    """Nodes that do not see `out`, with their complaints. An unreachable node has none and is left out."""
    folder, word = out / _FOLDER, secrets.token_hex(8)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _WORD).write_text(word)
    try:
        command = [sys.executable, "-m", "distbench.tools.cluster.shared_folder", str(folder), word]
        run(folder, {node: [*command, node] for node in nodes})
        return {node: said for node in nodes if (said := _said(folder, node, word))}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _said(folder: Path, node: str, word: str) -> str:
    """A node's complaint about the folder; empty where its mark is there, or where it printed nothing."""
    told = (folder / f"{node}.log").read_text(errors="replace")
    complaint = next((line for line in told.splitlines() if _COMPLAINT in line), "")
    if complaint:
        return complaint.partition(_COMPLAINT)[2]
    if word not in told:
        return ""
    deadline = time.monotonic() + _SHOWN_S
    while not (folder / node).exists():
        if time.monotonic() > deadline:
            return "what it writes there does not come here"
        time.sleep(_POLL_S)
    return ""


def main(folder: str, word: str, node: str) -> int:
    """Find the word, leave the mark, and print the word, or a complaint."""
    try:
        if (Path(folder) / _WORD).read_text() != word:
            complaint = "another folder by that name"
        else:
            (Path(folder) / node).touch()
            sys.stdout.write(f"{word}\n")
            return 0
    except OSError as error:
        complaint = f"{error.filename}: {error.strerror}"
    sys.stdout.write(f"{_COMPLAINT}{complaint}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
