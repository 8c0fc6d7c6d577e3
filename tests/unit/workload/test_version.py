"""The version of the inputs stands for their bits: bundles and reports carry it."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from distbench.pipeline.inputs import workload_for
from distbench.workload.version import INPUTS_VERSION, other_inputs
from tests.cases import tiny_case

ROUTINGS = ("uniform", "zipf:1.2", "hot-rank:1", "fan-in:2", "local", "duplicates")
BITS: dict[str, tuple[dict[str, Any], str]] = {
    "exact bf16": ({"numerics": "exact"}, "b71b63708b84e4ea"),
    "exact e4m3fn": ({"numerics": "exact", "dispatch_dtype": "fp8"}, "5c360c835e4eb8ed"),
    "exact e4m3fnuz": ({"numerics": "exact", "dispatch_dtype": "fp8", "fp8_format": "e4m3fnuz"}, "eed6387e28124102"),
    "exact, odd shape": (
        {"numerics": "exact", "hidden_size": 192, "intermediate_size": 96, "topk": 3},
        "ea8148b3a971a221",
    ),
    "gaussian bf16": ({"numerics": "gaussian"}, "557068b76f5e2e9e"),
    "gaussian e4m3fn": ({"numerics": "gaussian", "dispatch_dtype": "fp8"}, "7dfc781a99516005"),
}
BITS_OF_VERSION = 2


def digest(tensors: list[Tensor]) -> str:
    content = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def inputs_of(values: dict[str, Any]) -> list[Tensor]:
    """Tokens and experts' weights of two ranks under every routing."""
    found: list[Tensor] = []
    for routing in ROUTINGS:
        workload = workload_for(tiny_case(seed=7, tokens=(5,), routing=routing, **values), torch.device("cpu"))
        for rank in (0, 3):
            found += [part for part in workload.tokens(rank) if part is not None]
            found += [workload.routing_of(rank, 5), *workload.local_weights(rank)]
    return found


@pytest.mark.parametrize("kind", BITS)
def test_inputs_change_only_with_their_version(kind: str) -> None:
    values, known = BITS[kind]
    assert BITS_OF_VERSION == INPUTS_VERSION, "new digests belong to a new version: update both"
    assert digest(inputs_of(values)) == known, "inputs changed: raise INPUTS_VERSION, then update these digests"


def test_inputs_of_another_version_are_named() -> None:
    assert other_inputs(INPUTS_VERSION) == ""
    assert f"version {INPUTS_VERSION + 1};" in other_inputs(INPUTS_VERSION + 1)
    assert "version 1;" in other_inputs(1)
