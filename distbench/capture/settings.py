"""What a capture records, from arguments or from the environment, and of which layer. Loads no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

FOLDER = "DISTBENCH_CAPTURE"
EVERY = "DISTBENCH_CAPTURE_EVERY"
WEIGHTS = "DISTBENCH_CAPTURE_WEIGHTS"
LIMIT = "DISTBENCH_CAPTURE_LIMIT"
VIOLATIONS = "DISTBENCH_CAPTURE_VIOLATIONS"
MIB = "DISTBENCH_CAPTURE_MIB"
TENSORS = "DISTBENCH_CAPTURE_TENSORS_MIB"

_SWITCH = {"0": False, "1": True}
_DIGITS = 12
_SHOWN = 400


class Settings(NamedTuple):
    """A capture into `folder`: each rank records every `every`-th step, at most `most_bytes` in all.

    With `weights` routing weights are recorded as well. `limit` is the number of rows above which a step violates it, 0
    for the cut that the program itself makes. With `violations` the steps next to a violation are recorded too; with
    `most_tensor_bytes` above 0 also the hidden states of the violating layer, as many bytes in memory and in files.
    """

    folder: str
    every: int = 32
    weights: bool = False
    limit: int = 0
    violations: bool = False
    most_bytes: int = 256 << 20
    most_tensor_bytes: int = 0


class Place(NamedTuple):
    """Rank and layer of a dispatcher: `topk` experts of a token, of `num_experts` slots over `ep_size` ranks."""

    rank: int
    ep_size: int
    num_experts: int
    topk: int


def tell(text: str) -> None:
    """Say a line about the capture on standard error."""
    sys.stderr.write(f"distbench capture: {' '.join(text.split())[:_SHOWN]}\n")


def from_environment(environ: Mapping[str, str]) -> Settings | None:
    """The settings in the environment; None where no capture is asked for.

    Raises:
        ValueError: a variable has another value than allowed; names it.

    """
    folder = environ.get(FOLDER, "")
    if not folder:
        return None
    found = Settings(
        folder,
        every=_number(environ, EVERY, 32, least=1),
        weights=_switch(environ, WEIGHTS),
        limit=_number(environ, LIMIT, 0, least=0),
        violations=_switch(environ, VIOLATIONS),
        most_bytes=_number(environ, MIB, 256, least=1) << 20,
        most_tensor_bytes=_number(environ, TENSORS, 0, least=0) << 20,
    )
    if found.most_tensor_bytes and not found.violations:
        message = f"{TENSORS} keeps hidden states of violations: set {VIOLATIONS}=1 as well"
        raise ValueError(message)
    return found


def _number(environ: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = environ.get(name, "") or str(default)
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS and int(text) >= least):
        message = f"{name}={text!r:.40}: allowed are whole numbers from {least} up"
        raise ValueError(message)
    return int(text)


def _switch(environ: Mapping[str, str], name: str) -> bool:
    text = environ.get(name, "") or "0"
    if text not in _SWITCH:
        message = f"{name}={text!r:.40}: allowed are 0 and 1"
        raise ValueError(message)
    return _SWITCH[text]
