"""Public recipes: each variable is read as the SGLang release reads it for which the recipe was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.case.environment import read_environment
from distbench.case.resolve import FLAGS, Layer, Resolved, resolve_case
from distbench.case.sglang_env import near_miss, recorded_environment
from distbench.errors import Unsupported
from distbench.launcher.unused_variables import unused_variables

RECIPES = msgspec.toml.decode((Path(__file__).parents[2] / "data" / "recipes.toml").read_bytes())["recipe"]
LISTED = re.compile(r"MORI|^(?:AITER|ATOM|VLLM_ROCM)_")


def resolved(recipe: dict[str, Any], without: tuple[str, ...] = ()) -> Resolved:
    flags = {"transport": "mori", "experts": "aiter", "sglang_version": recipe["sglang"]}
    layers = [Layer(FLAGS, flags, strict=False)]
    environ = {name: value for name, (value, _) in recipe["variables"].items() if name not in without}
    return resolve_case([*layers, *read_environment(environ, layers)], 8)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["name"])
def test_each_variable_of_a_recipe_has_the_effect_in_the_table(recipe: dict[str, Any]) -> None:
    environ = {name: value for name, (value, _) in recipe["variables"].items()}
    refused = tuple(name for name, (_, fate) in recipe["variables"].items() if fate == "UNSUPPORTED")
    assert bool(refused) == (recipe.get("ends") == "UNSUPPORTED")
    for name in refused:
        with pytest.raises(Unsupported, match=f"env:{name}: production"):
            resolved(recipe, tuple(other for other in refused if other != name))
    found = resolved(recipe, refused)
    (line,) = unused_variables(environ, found.case, found.sources) or ("",)
    recorded = recorded_environment(environ)
    for name, (value, fate) in recipe["variables"].items():
        unused = f"{name}={value}" in line
        assert unused == fate.startswith("unused: "), (name, line)
        assert bool(near_miss(name, environ)) == (fate == "near miss"), name
        assert recorded[name] == value
        if unused:
            after = line[line.index(f"{name}={value}") :]
            assert after[after.index("(") + 1 : after.index(")")] == fate.removeprefix("unused: ")
        if "=" in fate:
            key, _, expected = fate.partition("=")
            assert str(getattr(found.case, key)) == expected
            assert found.sources[key] == f"env:{name}"


def test_every_known_variable_occurs_in_some_recipe() -> None:
    fates = {name: fate for recipe in RECIPES for name, (_, fate) in recipe["variables"].items()}
    assert all(LISTED.search(name) for name, fate in fates.items() if fate not in ("recorded", "package"))
    assert len(RECIPES) >= 20
    assert {fate.split(":")[0] for fate in fates.values() if "=" not in fate} == {
        *("package", "unused", "near miss", "neutral", "UNSUPPORTED", "recorded"),
    }
