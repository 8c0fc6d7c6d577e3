"""Verdicts of public tests' acceptance rules on a mutant's output, next to this bench's verdict.

Each rule is applied to tokens of the mutated arm and of the right one, as its test's kernel output and reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.case.spec import Case

_ALLCLOSE_MISSES = 0.05
_AITER_DIFF = 0.01
_DEEPEP_DIFF = {"bf16": 1e-5, "fp8": 9e-4}
_COSINE = 0.99


class Rule(NamedTuple):
    """One rule: its project, its source, its text, and whether it accepts `actual` bf16 [n, H] given `expected`."""

    project: str
    source: str
    text: str
    accepts: Callable[[Case, Tensor, Tensor], bool]


def _vllm(case: Case, actual: Tensor, expected: Tensor) -> bool:
    return bool(torch.isclose(actual, expected, atol=2e-2, rtol=0).all())


def _sglang(case: Case, actual: Tensor, expected: Tensor) -> bool:
    return bool(torch.isclose(actual, expected, rtol=1e-1, atol=1e-2).all())


def _misses(actual: Tensor, expected: Tensor) -> float:
    """Return the share of elements that aiter's checkAllclose counts; it takes the reference first."""
    return float((~torch.isclose(expected, actual, rtol=1e-2, atol=1e-2)).double().mean())


def _aiter(case: Case, actual: Tensor, expected: Tensor) -> bool:
    return _misses(actual, expected) <= _ALLCLOSE_MISSES


def _aiter_strict(case: Case, actual: Tensor, expected: Tensor) -> bool:
    if bool(actual.isnan().any()):
        return False
    return _misses(actual, expected) == 0 or _difference(actual.double(), expected.double()) <= _AITER_DIFF


def _deepep(case: Case, actual: Tensor, expected: Tensor) -> bool:
    difference = _difference(actual.double() + 1, expected.double() + 1)
    return not bool(actual.isnan().any()) and difference < _DEEPEP_DIFF[case.dispatch_dtype]


def _cosine(case: Case, actual: Tensor, expected: Tensor) -> bool:
    flat = actual.float().reshape(1, -1), expected.float().reshape(1, -1)
    return float(torch.nn.functional.cosine_similarity(*flat)) > _COSINE


def _difference(first: Tensor, second: Tensor) -> float:
    """Return 1 - 2 <x, y> / (<x, x> + <y, y>), as DeepEP's and aiter's calc_diff do."""
    return float(1 - 2 * (first * second).sum() / (first * first + second * second).sum())


RULES = {
    "vllm": Rule(
        "vLLM",
        "tests/kernels/moe/test_moe.py, run_moe_test, at 0026f3797060",
        "every element within 2e-2",
        _vllm,
    ),
    "sglang": Rule(
        "SGLang",
        "test/registered/moe/test_fused_moe.py, get_tolerance, at 071675979c07",
        "every element within 1e-2 + 1e-1 of the reference",
        _sglang,
    ),
    "aiter": Rule(
        "aiter",
        "aiter/test_common.py, checkAllclose, at 029455b479a9",
        "95 % of the elements within 1e-2 + 1e-2 of the result",
        _aiter,
    ),
    "aiter-strict": Rule(
        "aiter",
        "op_tests/test_moe_2stage.py, strict_accuracy, at 0148af7d5c32",
        "no NaN, and all elements as above or a difference measure of at most 0.01",
        _aiter_strict,
    ),
    "deepep": Rule(
        "DeepEP",
        "deep_ep/utils/math.py, calc_diff, and tests/legacy/test_low_latency.py, at dd758caf4518",
        "no NaN, and a difference measure of values + 1 below 1e-5, with fp8 dispatch 9e-4",
        _deepep,
    ),
    "cosine": Rule(
        "vLLM",
        "tests/kernels/moe/test_flashinfer_nvfp4_cosine_similarity.py (relu2), at 978a6a5e220b",
        "a cosine of all elements above 0.99",
        _cosine,
    ),
}


def accepted_by(case: Case, actual: Tensor, expected: Tensor) -> dict[str, bool]:
    """Return whether each rule accepts tokens bf16 [n, H], given the right ones; empty without tokens."""
    if not actual.numel():
        return {}
    return {name: rule.accepts(case, actual, expected) for name, rule in RULES.items()}
