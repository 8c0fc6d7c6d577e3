"""Iterations that are not timed are told one by one: the time limit of a stage is for one of them, not for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from distbench.session import Session
from distbench.timing import Timer
from tests.cases import tiny_case


def test_each_untimed_iteration_leaves_a_breadcrumb() -> None:
    told: list[str] = []
    crumbs = SimpleNamespace(mark=told.append)
    session = cast(Session, SimpleNamespace(device=torch.device("cpu"), crumbs=crumbs, group=None))

    def layer(_: Any) -> Tensor:
        told.append("ran")
        return torch.zeros(1, 1, dtype=torch.bfloat16)

    Timer(session, tiny_case(iterations=0, warmup=3)).time(layer, torch.zeros(1, 1, dtype=torch.bfloat16))
    assert told == ["timing", "ran"] * 3
