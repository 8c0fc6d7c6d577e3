"""Commented files to start from: a case with every key, and a suite."""

from __future__ import annotations

import json
import textwrap
from typing import Any, Literal, get_args, get_origin

from distbench.case.groups import GROUPS
from distbench.case.presets import PRESETS
from distbench.case.spec import FIELD_DEFAULTS, FIELD_HINTS, FLAG_KEYS

_WIDTH = 100
_ACTIVE = ("model", "tokens", "routing", "limit", "policy")
_SUITE = """\
# A suite of distbench: many cases in one launch. docs/suites.md has every table.
# Run it:    distbench suite {path} -n 4 --out results      (the same command resumes)

description = "what these cases show"
tags = ["mine"]                     # of all cases, for --select

[defaults]                          # keys of a case, for all cases: `distbench init` lists them
model = "{model}"
tokens = [0, 1, 7, 33, "..."]       # of each rank; "..." repeats the list over the ranks
policy = "unchecked"                # cut as production does, however few rows the limit keeps

[axes]                              # every combination is a case; the last axis varies fastest
routing = ["uniform", "zipf:1.2"]
limit = ["sum32", "max-recv", "max-recv-1"]

# [[exclude]]                       # combinations to leave out: all of these keys hold
# routing = "zipf:1.2"
# limit = "sum32"

[[include]]                         # one more case: the defaults and these keys
name = "one idle rank"
tokens = [0, 16, "..."]
limit = "sum"

[[expect]]                          # expected ending of cases; the first match counts. Default: by the limit
verdict = "UNDER_LIMIT"
match = {{ limit = "max-recv-1" }}
"""


def suite_template(path: str, model: str) -> str:
    """Text of a suite file with every table; `path` is named in its commands."""
    return _SUITE.format(path=path, model=model)


def case_template(path: str, model: str) -> str:
    """Text of a case file with every key: the usual ones set, all others commented out with their defaults."""
    head = [
        "# A case of distbench: one layer, one batch, one limit.",
        f"# Run it:    distbench run --case {path} -n 8",
        "# Flags win over this file, this file over the SGLANG_MORI_* variables. Keys behind a # have their defaults.",
    ]
    for word, group in GROUPS.items():
        keys = [key for key in group.units if key not in FLAG_KEYS]
        head += ["", f"# {group.text}: `distbench run --help={word}`"]
        head += [line for key in keys for line in _key_lines(key, model)]
    return "\n".join(head) + "\n"


def _key_lines(key: str, model: str) -> list[str]:
    kind, *notes = get_args(FIELD_HINTS[key])
    words = f" ({', '.join(get_args(kind))})" if get_origin(kind) is Literal else ""
    lines = [f"# {line}" for line in textwrap.wrap(notes[-1].description + words, _WIDTH, break_on_hyphens=False)]
    value = model if key == "model" else _value(key, model)
    setting = f"{key} = {json.dumps(value)}"
    return [*lines, setting if key in _ACTIVE else f"# {setting}"]


def _value(key: str, model: str) -> Any:
    """Default of a key; a dimension's is the preset's, with 8 ranks."""
    if key not in FIELD_DEFAULTS:
        shape = PRESETS[model]
        return shape.experts_for(8) if key == "num_experts" else getattr(shape, key)
    default = FIELD_DEFAULTS[key]
    return default[0] if isinstance(default, tuple) and default else default
