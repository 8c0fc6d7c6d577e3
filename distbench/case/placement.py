"""Experts in the slots of the ranks: the table of a case, read from a file, and what fits a number of ranks.

Slots of routed experts are numbered over all ranks, an equal share on each, as EPLB's physical experts are. Shared
experts have slots of their own behind those of their rank (workload/slots.py), and are in no table.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from distbench.case.spec import TokenCount
from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.utils.text import shown, why

MOST_SLOTS = 1 << 17
_MOST_BYTES = 64 << 20
_MOST_SHARED = 2
_ARE = {1: "is", 2: "are"}
_SGLANG = "physical_to_logical_map"
_NAME = re.compile(r"(.+?)(?:@(\d{1,6}))?", re.ASCII | re.DOTALL)
_NUMBERS = re.compile(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", re.ASCII)


def experts_in_slots(num_experts: int, physical_experts: int, placement: Sequence[int]) -> tuple[int, ...]:
    """Expert in each slot of routed experts, by the keys of a case: its table, else slot p has expert p modulo E."""
    return tuple(placement) or tuple(slot % num_experts for slot in range(physical_experts or num_experts))


def normal_keys(num_experts: int, physical_experts: int, placement: str | Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Keys `physical_experts` and `placement` in the one form that a case has of each placement.

    Raises:
        InvalidCase: `placement` is a file that cannot be read, or `physical_experts` is not its number of slots.

    """
    table = read_placement(placement) if isinstance(placement, str) else tuple(placement)
    if table and physical_experts not in (0, len(table)):
        message = f"physical_experts = {physical_experts}: placement lists {len(table)} slots; drop one of them"
        raise InvalidCase(message)
    slots = len(table) or physical_experts
    if table == experts_in_slots(num_experts, slots, ()):
        table = ()
    return (0 if slots == num_experts and not table else slots), table


def check_placement(num_experts: int, ep_size: int, physical_experts: int, placement: Sequence[int]) -> None:
    """Refuse slots that the ranks cannot share evenly, or that leave an expert without one.

    Raises:
        InvalidCase: names the numbers, and what they may be.

    """
    slots = physical_experts or num_experts
    if not physical_experts:
        _refuse_uneven(num_experts, ep_size)
    if slots % ep_size or slots < num_experts or slots > MOST_SLOTS:
        message = (
            f"physical_experts = {slots}: {ep_size} ranks share the slots evenly, and each of {num_experts} experts has"
            f" one; give a multiple of {ep_size} from {-(-num_experts // ep_size) * ep_size} to {MOST_SLOTS}"
        )
        raise InvalidCase(message)
    held = set(placement)
    if placement and held != set(range(num_experts)):
        odd = next((one for one in placement if one >= num_experts), None)
        wrong = f"expert {odd} in it" if odd is not None else f"expert {min(set(range(num_experts)) - held)} in no slot"
        message = f"placement: {len(placement)} slots with {wrong}; give each of the experts 0 to {num_experts - 1}"
        raise InvalidCase(message)


def _refuse_uneven(num_experts: int, ep_size: int) -> None:
    if num_experts % ep_size == 0:
        return
    whole = num_experts // ep_size * ep_size
    shared = num_experts - whole
    ways = [f"use {whole or ep_size} experts"]
    if whole and shared <= _MOST_SHARED:
        ways.append(f"--num-experts {whole} --shared-experts {shared} if {shared} of them {_ARE[shared]} shared")
    ways.append(f"--physical-experts {whole + ep_size} if some are replicated")
    message = f"num_experts = {num_experts}: not divisible by {ep_size} ranks; {', or '.join(ways)}"
    raise InvalidCase(message)


def read_placement(text: str) -> tuple[int, ...]:
    """Expert in each slot, from numbers joined by commas, or from a file, `FILE@LAYER` where it has several layers.

    A file is .npy, or .json: a list, a list of one for each layer, or SGLang's table with `physical_to_logical_map`.

    Raises:
        InvalidCase: it cannot be read, or is something else.

    """
    if not text.strip():
        return ()
    if _NUMBERS.fullmatch(text):
        return tuple(int(part) for part in text.split(","))
    named = _NAME.fullmatch(text)
    path, layer = (named[1], named[2]) if named else (text, None)
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        layers = _decoded(path, content)
    except (OSError, ValueError, TypeError, EOFError, RecursionError, MemoryError) as error:
        _refuse(
            text, f"cannot be read ({why(error)}); give numbers, or a .json or .npy file of the expert of each slot"
        )
    if layer is None and len(layers) > 1:
        _refuse(text, f"has {len(layers)} layers; name one: {path}@0")
    if layers and layer is not None and int(layer) >= len(layers):
        _refuse(text, f"has {len(layers)} layers; name one of 0 to {len(layers) - 1}")
    if not layers or not layers[int(layer or 0)]:
        _refuse(text, "lists no slot; give the expert of each, or drop the key")
    return layers[int(layer or 0)]


def _decoded(path: str, content: bytes) -> list[tuple[int, ...]]:
    """Slots of each layer.

    Raises:
        ValueError: another format, or too much of it.

    """
    if len(content) > _MOST_BYTES:
        message = f"more than {_MOST_BYTES >> 20} MiB"
        raise ValueError(message)
    if Path(path).suffix == ".npy":
        import numpy as np  # noqa: PLC0415 - most cases have no table

        array = np.load(io.BytesIO(content), allow_pickle=False)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            message = f"an array {array.dtype} of {array.ndim} dimensions, not whole numbers of one or two"
            raise ValueError(message)
        found: Any = array.tolist()
    else:
        found = msgspec.json.decode(content)
        found = found.get(_SGLANG) if isinstance(found, dict) else found
    layers = [found] if isinstance(found, list) and not (found and isinstance(found[0], list)) else found
    return msgspec.convert(layers, list[tuple[TokenCount, ...]])


def _refuse(text: str, reason: str) -> NoReturn:
    message = f"placement = {shown(text)}: {reason}"
    raise InvalidCase(message)
