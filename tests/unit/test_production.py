"""SGLang's variables: what they set, what is refused, which names do nothing."""

from __future__ import annotations

import pytest

from distbench.errors import InvalidCase
from distbench.production import (
    DISPATCH_TOKENS,
    LIMIT,
    PREALLOC,
    RECV_BOUND,
    near_misses,
    read_environment,
    recorded_environment,
)
from distbench.resolve import resolve_case


def test_variables_become_keys_and_are_named_as_sources() -> None:
    environ = {LIMIT: "128", DISPATCH_TOKENS: "512", PREALLOC: "2048", RECV_BOUND: "true"}
    resolved = resolve_case(read_environment(environ), 8)
    case = resolved.case
    assert (case.limit, case.max_dispatch_tokens_per_rank, case.recv_bound) == ("128", 512, True)
    assert case.capacity == 2048
    assert resolved.sources["limit"] == f"env:{LIMIT}"


@pytest.mark.parametrize("text", ["0", ""])
def test_zero_turns_the_limit_off_and_unset_leaves_the_default(text: str) -> None:
    case = resolve_case(read_environment({LIMIT: text}), 8).case
    assert case.limit == ("off" if text else "sum32")


def test_recv_bound_alone_takes_the_place_of_the_default_limit() -> None:
    resolved = resolve_case(read_environment({RECV_BOUND: "1"}), 8)
    assert resolved.case.limit == "off"
    assert resolved.sources["limit"] == f"env:{RECV_BOUND}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (LIMIT, "12k", "not a whole number; production would warn, fall back to 0 and cut nothing"),
        (LIMIT, "-1", "negative; production would take it as off"),
        (LIMIT, "1.5", "not a whole number"),
        (PREALLOC, "many", "size the buffer for the worst case"),
        (DISPATCH_TOKENS, "4096.0", "fall back to 4096"),
        (DISPATCH_TOKENS, "0", "no token could be sent"),
        (RECV_BOUND, "on", "allowed are true, 1, yes, y"),
    ],
)
def test_what_production_would_ignore_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidCase, match=message) as caught:
        read_environment({name: text})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "MORI_MOE_MAX_INPUT_TOKENS",
        "SGLANG_MORI_MOE_MAX_INPUT_TOKEN",
        "SGLANG_MORI_MAX_INPUT_TOKENS",
        "sglang_mori_moe_max_input_tokens",
        "MORI_RECV_BOUND",
        "SGLANG_MORI_PREALLOC_MAX_RECV_TOKEN",
    ],
)
def test_near_misses_are_warned_of(name: str) -> None:
    (warning,) = near_misses({name: "64"})
    assert name in warning
    assert "has no effect: production reads SGLANG_MORI_" in warning


@pytest.mark.parametrize("name", [LIMIT, "MORI_SHMEM_HEAP_SIZE", "PATH", "MORI_RDMA_SL", "SGLANG_MORI_NO_PAD_MASK"])
def test_known_and_unrelated_names_are_not(name: str) -> None:
    assert near_misses({name: "1"}) == []


def test_only_listed_variables_are_recorded() -> None:
    environ = {LIMIT: "1", "AWS_SECRET_ACCESS_KEY": "x", "AITER_KSPLIT": "2", "HOME": "/"}
    assert recorded_environment(environ) == {LIMIT: "1", "AITER_KSPLIT": "2"}
