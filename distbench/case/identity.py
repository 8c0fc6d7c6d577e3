"""What identifies a case: its values as reports have them, and their hash."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from distbench.case.plugins import OPTION_KEYS
from distbench.case.spec import CALL_KEYS, CALLER_KEYS, FIELD_DEFAULTS, SHAPE_KEYS, Case

_NO_PROFILE_KEYS = (*SHAPE_KEYS, "share_devices")
"""Keys that no profile sets: with their defaults they are in no hash, so that cases of a profile keep theirs."""
_SPARSE_KEYS = (
    *_NO_PROFILE_KEYS,
    "routing_sha256",
    *CALLER_KEYS,
    "caller_wheel_sha256",
    "caller_folder_sha256",
    *CALL_KEYS,
    *OPTION_KEYS,
    "profile",
    "mori_geometry",
)


def case_values(case: Case) -> dict[str, Any]:
    """The case as builtins, for its hash and for reports; sparse keys with defaults are left out.

    With a profile, those that it may set are written: it has other defaults.
    """
    values: dict[str, Any] = msgspec.to_builtins(case)
    sparse = _NO_PROFILE_KEYS if case.profile != FIELD_DEFAULTS["profile"] else _SPARSE_KEYS
    return {key: value for key, value in values.items() if key not in sparse or value != FIELD_DEFAULTS[key]}


def case_hash(case: Case) -> str:
    """SHA-256 over the case's canonical JSON, as 64 hex digits."""
    return hashlib.sha256(msgspec.json.encode(case_values(case), order="sorted")).hexdigest()
