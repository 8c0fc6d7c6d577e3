"""Production's environment, read as the program of the case's profile reads it; without a profile as SGLang does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from distbench.case import atom_env, sglang_env, vllm_env
from distbench.case.profiles import NO_PROFILE, program_of
from distbench.case.resolve import Layer, asked_value
from distbench.case.variables import set_variables, sorting_layers

_SORTING = "SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY"
Reader = Callable[[Sequence[Layer]], list[Layer]]
"""Layers of the environment, given the layers that are stronger."""


def read_environment(environ: Mapping[str, str], layers: Sequence[Layer] = ()) -> list[Layer]:
    """Layers of the production variables that are set; an empty value counts as unset.

    `layers` are stronger than the environment, and may name a profile, and the SGLang release whose rules apply.

    Raises:
        InvalidCase: a value that production would ignore, with production's reaction; or an unknown SGLang release.

    """
    profile = str(asked_value("profile", layers) or NO_PROFILE)
    program = program_of(profile)
    if program == "vllm":
        return vllm_env.vllm_layers(environ)
    if program == "atom":
        return atom_env.atom_layers(environ)
    found = sglang_env.sglang_layers(environ, layers)
    if profile == NO_PROFILE:
        return found
    return [*found, *sorting_layers(_SORTING, set_variables(environ, [_SORTING]), "warn and take 2")]


def reader(environ: Mapping[str, str]) -> Reader:
    """A reader of `environ` for many cases, which reads once for each profile and SGLang release."""
    known: dict[tuple[object, object], list[Layer]] = {}

    def read(layers: Sequence[Layer]) -> list[Layer]:
        asked = asked_value("profile", layers), asked_value("sglang_version", layers)
        if asked not in known:
            known[asked] = read_environment(environ, layers)
        return known[asked]

    return read


def keys_of(profile: str) -> Mapping[str, str]:
    """The key of a case that a variable sets under `profile`."""
    return {"vllm": vllm_env.KEYS, "atom": atom_env.KEYS, "sglang": sglang_env.KEYS}[program_of(profile)]


def reason_unread(name: str, profile: str) -> str:
    """Reason why the program of a profile of vLLM or ATOM does not read a variable of vLLM, ATOM or SGLang."""
    program = program_of(profile)
    owner = next((known for known in ("vllm", "atom", "sglang") if name.startswith(f"{known.upper()}_")), "")
    if owner == program:
        return {"vllm": vllm_env.reason_unread, "atom": atom_env.reason_unread}[owner](name)
    return f"profile {profile}: {'vLLM' if program == 'vllm' else 'ATOM'} does not read it" if owner else ""
