"""Names of recorded routing in a case: `trace:PATH`, or `trace:PATH@STEP.LAYER` for one step and layer of the file."""

from __future__ import annotations

import re
from typing import NamedTuple

KIND = "trace"
_NAME = re.compile(rf"{KIND}:(.+?)(?:@(\d{{1,15}})\.(\d{{1,7}}))?", re.ASCII | re.DOTALL)


class TraceName(NamedTuple):
    """A file, and the step and layer in it; None for the first."""

    path: str
    step: int | None = None
    layer: int | None = None

    def __str__(self) -> str:
        """Text that `trace_name` reads."""
        return f"{KIND}:{self.path}" + (f"@{self.step}.{self.layer}" if self.step is not None else "")


def trace_name(routing: str) -> TraceName | None:
    """The recorded routing that the key `routing` of a case names; None for another kind."""
    found = _NAME.fullmatch(routing.strip())
    if not found:
        return None
    return TraceName(found[1], *(None if part is None else int(part) for part in found.groups()[1:]))
