"""Sizes of mori's symmetric heap, as its variable writes them."""

from __future__ import annotations

import re

_HEAP_SIZE = re.compile(r"([0-9]{1,12})(?:([KMG])(?:B|b|iB)?|([kmg])(?:b|ib)?)?")
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30}


def parse_heap_size(text: str) -> int:
    """Bytes that MoRI derives from MORI_SHMEM_HEAP_SIZE.

    Raises:
        ValueError: not a number with a suffix that MoRI knows: MoRI would read only the digits, `6T` as 6 bytes.

    """
    matched = _HEAP_SIZE.fullmatch(text)
    if matched is None:
        message = "no size; write for instance 6G: MoRI knows K, KB, Kb, KiB, k, kb and kib, and the same for M and G"
        raise ValueError(message)
    return int(matched[1]) << _SHIFTS[(matched[2] or matched[3] or "").upper()]
