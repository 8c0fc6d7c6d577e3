"""Start of a command on a node: a list of arguments, never a line for a local shell.

A launcher's items may hold {host}. Its item {command} is replaced by the whole command as one quoted argument, for
launchers such as ssh that pass a line to a remote shell; without it the command's arguments are appended.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import msgspec

from distbench.errors import InvalidCase
from distbench.utils.text import one_line, shown

LOCAL = "local"
LAUNCHERS: dict[str, tuple[str, ...]] = {
    LOCAL: (),
    "slurm": ("srun", "--overlap", "--nodes=1", "--ntasks=1", "--kill-on-bad-exit=1", "--nodelist={host}"),
    "ssh": ("ssh", "-o", "BatchMode=yes", "--", "{host}", "{command}"),
}

_HOST, _COMMAND = "{host}", "{command}"


def parse_launcher(text: str) -> tuple[str, ...]:
    """Arguments of a launcher by name, or of a JSON list.

    Raises:
        InvalidCase: the text is neither.

    """
    if text in LAUNCHERS:
        return LAUNCHERS[text]
    try:
        launcher = msgspec.json.decode(text, type=tuple[str, ...])
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        allowed = (
            f"allowed are {', '.join(LAUNCHERS)}, or a JSON list of arguments such as " + '["pdsh", "-w", "{host}"]'
        )
        message = f"launcher {shown(text)}: {one_line(error)}; {allowed}"
        raise InvalidCase(message) from error
    if not any(_HOST in item for item in launcher):
        message = f"launcher {shown(text)}: no argument holds {_HOST}, so every node would be the same one"
        raise InvalidCase(message)
    return launcher


def command_on(launcher: Sequence[str], host: str, command: Sequence[str]) -> list[str]:
    """Arguments that start `command` on `host`."""
    started = [item if item == _COMMAND else item.replace(_HOST, host) for item in launcher]
    if _COMMAND in started:
        return [shlex.join(command) if item == _COMMAND else item for item in started]
    return [*started, *command]
