"""`aiter.fused_moe` as a caller reaches it: its arguments are kept and compared with distbench's own call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distbench.callers.base import Call, Steps
from distbench.errors import DistbenchError
from distbench.experts.aiter.adapter import AiterExperts
from distbench.experts.base import ExpertInput, ExpertWeights

_ROWS = {"hidden_states", "topk_weight", "topk_ids", "a1_scale", "num_local_tokens"}
"""Arguments that the stage checks compare row by row."""


class WatchedFusedMoe:
    """`fused_moe` of the package that experts use, with its signature; each call is checked first and kept."""

    def __init__(self, experts: AiterExperts) -> None:
        self._experts = experts
        self._watched: tuple[ExpertWeights, Steps] | None = None
        self._calls: list[Call] = []

        @functools.wraps(experts.package.moe.fused_moe)
        def fused_moe(*positional: Any, **named: Any) -> Tensor:
            return self._call(positional, named)

        self.fused_moe = fused_moe

    @contextmanager
    def watching(self, weights: ExpertWeights, steps: Steps) -> Iterator[None]:
        """Keep the calls made inside; `steps` sees each input before the kernels do."""
        self._watched, self._calls = (weights, steps), []
        try:
            yield
        finally:
            self._watched, self._calls = None, []

    def call(self, output: Tensor) -> Call:
        """The pass's only call, with the rows `output` that the caller returns to combine.

        Raises:
            DistbenchError: the caller called `fused_moe` never or more than once.

        """
        if len(self._calls) != 1:
            message = f"the caller called fused_moe {len(self._calls)} times in a pass; distbench follows one call"
            raise DistbenchError(message)
        return self._calls[0]._replace(output=output)

    def _call(self, positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        fused_moe = self._experts.package.moe.fused_moe
        assert self._watched is not None  # noqa: S101 - the caller runs inside `watching`
        weights, steps = self._watched
        bound = inspect.signature(fused_moe).bind(*positional, **named)
        bound.apply_defaults()
        given = _input_of(bound.arguments)
        steps.given(given)
        ours = inspect.signature(fused_moe).bind(**self._experts.arguments(given, weights))
        ours.apply_defaults()
        output: Tensor = fused_moe(*positional, **named)
        self._calls.append(Call(given, output, _differing(bound.arguments, ours.arguments)))
        return output


def _input_of(arguments: dict[str, Any]) -> ExpertInput:
    live = arguments["num_local_tokens"]
    if live is None:
        message = "the caller gives fused_moe no num_local_tokens: all rows, stale ones too, would count as received"
        raise DistbenchError(message)
    return ExpertInput(
        hidden=arguments["hidden_states"],
        scales=arguments["a1_scale"],
        weights=arguments["topk_weight"],
        ids=arguments["topk_ids"],
        num_local_tokens=live,
    )


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Arguments whose values differ, rows excepted, which are compared apart."""
    return {
        name: (_shown(value), _shown(ours[name]))
        for name, value in theirs.items()
        if name not in _ROWS and not _same(value, ours[name])
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    return str(value)
