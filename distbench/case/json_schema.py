"""JSON Schemas of case files and suite files, generated from the keys of a case."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec

from distbench.case.spec import DERIVED_KEYS, FIELD_DEFAULTS, FIELD_HINTS, FIELD_TYPES, UNSTORED_KEYS, TokenCount

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TOKENS = TokenCount | tuple[TokenCount | Literal["..."], ...]
_TEXT = {"type": "string"}
_TAGS = {"type": "array", "items": _TEXT}


def case_schema() -> dict[str, Any]:
    """JSON Schema of a case file: each key with its type, bounds, default and text."""
    return {"$schema": _DIALECT, "title": "distbench case", **_case_table(DERIVED_KEYS)}


def suite_schema() -> dict[str, Any]:
    """JSON Schema of a suite file; keys in its tables are those of a case."""
    case = _case_table(UNSTORED_KEYS)
    keys: dict[str, Any] = case["properties"]
    include = case | {"properties": keys | {"name": _TEXT, "tags": _TAGS, "expect": _TEXT}}
    axis = {key: {"type": "array", "minItems": 1, "items": {"anyOf": [one, case]}} for key, one in keys.items()}
    tables = {"type": "array", "minItems": 1, "items": case}
    rule = {
        "type": "object",
        "properties": {"verdict": _TEXT, "match": case},
        "required": ["verdict"],
        "additionalProperties": False,
    }
    return {
        "$schema": _DIALECT,
        "title": "distbench suite",
        "type": "object",
        "properties": {
            "name": _TEXT,
            "description": _TEXT,
            "tags": _TAGS,
            "defaults": case,
            "axes": {"type": "object", "properties": axis, "additionalProperties": tables},
            "include": {"type": "array", "items": include},
            "exclude": {"type": "array", "items": case},
            "expect": {"type": "array", "items": rule},
        },
        "additionalProperties": False,
    }


def _case_table(left_out: tuple[str, ...]) -> dict[str, Any]:
    fields = [(key, _typed(key), FIELD_DEFAULTS.get(key, msgspec.UNSET)) for key in FIELD_TYPES if key not in left_out]
    table = msgspec.defstruct("case", fields, forbid_unknown_fields=True, kw_only=True)
    made: dict[str, Any] = msgspec.json.schema(table)["$defs"]["case"]
    return {key: value for key, value in made.items() if key not in ("title", "required")}


def _typed(key: str) -> Any:
    """Type of a key in a file, with its text."""
    kind = _TOKENS if key == "tokens" else FIELD_TYPES[key]
    return Annotated[kind, get_args(FIELD_HINTS[key])[-1]] if key in ("tokens", "limit", "placement") else kind
