"""Hidden states in a capture's folder: those of a step and layer that all ranks have, mapped and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.capture.part_file import FORMAT, TENSORS, VERSION, Seen
from distbench.errors import InvalidCase
from distbench.utils.text import counted
from distbench.workload.trace_file import open_trace
from distbench.workload.trace_tensors import WORDS, Tensors, bad_tensors, map_tensors

_MOST_MAPPED = 1 << 14
"""Files that are mapped at once; a process may have some 65,000 mappings."""

_Slice = tuple[int, int]


def captured_tensors(
    folder: str, names: Iterable[str], slices: Mapping[_Slice, dict[int, Seen]], ranks: int
) -> tuple[dict[_Slice, Tensors], list[str]]:
    """Hidden states by step and layer, without rows of padding, and what is left out of them, as sentences.

    All are of one format and size.
    """
    found: dict[_Slice, dict[int, str]] = {}
    for name in names:
        if part := TENSORS.fullmatch(name):
            found.setdefault((int(part[2]), int(part[3])), {})[int(part[1])] = str(Path(folder, name))
    tensors: dict[_Slice, Tensors] = {}
    notes = []
    for place, paths in sorted(found.items()):
        told = f"hidden states of step {place[0]}, layer {place[1]} are left out: "
        seen = slices.get(place, {})
        if len(paths) < ranks or len(seen) < ranks:
            notes.append(f"{told}{min(len(paths), len(seen))} of {counted(ranks, 'rank')} have them")
            continue
        if (len(tensors) + 1) * ranks > _MOST_MAPPED:
            notes.append(f"{told}more than {_MOST_MAPPED} files of hidden states")
            break
        one, problem = _joined([(paths[rank], seen[rank]) for rank in range(ranks)])
        first = next(iter(tensors.values()), one)
        if one is None or first is None or (one.kind, one.hidden_size) != (first.kind, first.hidden_size):
            notes.append(told + (problem or "another format or size than the first ones'"))
            continue
        tensors[place] = one
    return tensors, notes


def _joined(parts: list[tuple[str, Seen]]) -> tuple[Tensors | None, str]:
    """The hidden states of all ranks' tokens in order; None and the reason where there are none."""
    try:
        ranks = [_mapped(path, seen) for path, seen in parts]
    except InvalidCase as error:
        return None, str(error)
    if len({(one.kind, one.hidden_size) for one in ranks}) > 1:
        return None, "ranks have other formats or sizes"
    bits = tuple(part for one in ranks for part in one.parts)
    joined = Tensors(ranks[0].kind, bits, tuple(part for one in ranks for part in one.scales))
    problem = bad_tensors(joined)
    return (None, problem) if problem else (joined, "")


def _mapped(path: str, seen: Seen) -> Tensors:
    """The hidden states of one rank's tokens, without rows of padding, whose contents are whatever was there.

    Raises:
        InvalidCase: not of the format, or not of the recorded tokens.
    """
    opened = open_trace(path)
    metadata = opened.metadata() or {}
    kind = metadata.get("kind", "")
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION) or kind not in WORDS:
        message = f"{path!r:.200} are no hidden states of version {VERSION} of a capture"
        raise InvalidCase(message)
    shape = opened.get_slice("hidden").get_shape() if "hidden" in opened.keys() else []  # noqa: SIM118 - not a dict
    size = shape[1] if len(shape) == 2 and prod(shape[1:]) > 0 else 1  # noqa: PLR2004 - `map_tensors` names others
    whole = map_tensors(path, ("hidden", "scales"), kind, (len(seen.ids), size))
    used = (seen.ids != -1).any(axis=1)
    return whole if used.all() else Tensors(kind, _rows(whole.parts, used), _rows(whole.scales, used))


def _rows(parts: tuple[NDArray[Any], ...], used: NDArray[np.bool_]) -> tuple[NDArray[Any], ...]:
    return tuple(part[used] for part in parts)
