"""The limit as text and as rows, and the two capacities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.case.limits import Traffic, check_capacity, parse_limit, resolve_limit
from distbench.errors import InvalidCase, Overflow

WRONG_OFFSETS = (
    *("max-recv-", "max-recv--1", "max-recv+1.5", "max-recv+١", "max-recv - 1", "max-recv+" + "9" * 13),
    *("capacity-1", "sum+1", "sum32-1", "off+1"),
)
UNEVEN = Traffic(tokens=(0, 1, 7, 33), total_recv=(9, 20, 20, 11), capacity=256)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("off", "off"),
        (0, "off"),
        ("0", "off"),
        ("00", "off"),
        (" 007 ", "7"),
        (128, "128"),
        ("999999999999", "999999999999"),
        ("max-recv-1", "max-recv-1"),
        ("max-recv+007", "max-recv+7"),
        ("max-recv-0", "max-recv"),
        ("capacity", "capacity"),
        ("capacity+12", "capacity+12"),
        ("capacity+0", "capacity"),
    ],
)
def test_limit_text_is_parsed_to_its_canonical_form(text: str | int, canonical: str) -> None:
    assert parse_limit(text) == canonical


@pytest.mark.parametrize(
    "text",
    ["", "-", "1.5", "max", "١٢", "1e3", "0x10", "a\nb", "9" * 13, "9" * 5000, *WRONG_OFFSETS],
)
def test_unknown_limit_word_is_refused_with_the_allowed_ones(text: str) -> None:
    with pytest.raises(InvalidCase, match="allowed are off") as caught:
        parse_limit(text)
    assert len(str(caught.value).splitlines()) == 1


def test_limit_of_more_than_12_digits_is_refused() -> None:
    for number in (10**12, -(10**12), 1 << 40000, -(1 << 40000)):
        with pytest.raises(InvalidCase, match="up to 12 digits"):
            parse_limit(number)


def test_negative_limit_is_refused_and_names_productions_reading() -> None:
    with pytest.raises(InvalidCase, match="production takes a negative limit as off"):
        parse_limit(-3)


@pytest.mark.parametrize(
    ("limit", "rows"),
    [
        ("off", None),
        ("12", 12),
        ("max-recv", 20),
        ("max-recv-1", 19),
        ("max-recv-19", 1),
        ("max-recv+13", 33),
        ("sum", 41),
        ("sum32", 64),
        ("pow2", 64),
        ("capacity", 256),
        ("capacity+1", 257),
    ],
)
def test_limit_resolves_to_rows_for_uneven_traffic(limit: str, rows: int | None) -> None:
    assert resolve_limit(limit, UNEVEN) == rows


def test_sum32_limit_is_capped_at_the_receive_buffer() -> None:
    full = Traffic(tokens=(4, 4), total_recv=(8, 8), capacity=8)
    assert resolve_limit("sum32", full) == 8


@pytest.mark.parametrize(("total", "rows"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_pow2_limit_rounds_up_to_a_power_of_two(total: int, rows: int) -> None:
    assert resolve_limit("pow2", Traffic((total,), (total,), 256)) == rows


@pytest.mark.parametrize("limit", ["max-recv", "max-recv-1", "max-recv-200", "sum"])
def test_limit_that_resolves_to_zero_rows_is_refused(limit: str) -> None:
    with pytest.raises(InvalidCase, match="production reads as off"):
        resolve_limit(limit, Traffic((0, 0), (0, 0), 64))


@given(st.lists(st.integers(0, 64), min_size=1, max_size=16), st.integers(1, 2000))
def test_safe_limits_hold_the_worst_case_routing(tokens: list[int], spare: int) -> None:
    worst = sum(tokens)
    traffic = Traffic(tuple(tokens), tuple(worst for _ in tokens), worst + spare)
    for limit in ("sum", "sum32", "pow2"):
        if worst:
            rows = resolve_limit(limit, traffic)
            assert rows is not None
            assert rows >= min(worst, traffic.capacity)


def test_capacity_is_checked_for_sent_and_received_rows() -> None:
    check_capacity(UNEVEN, 33)
    with pytest.raises(Overflow, match="max_dispatch_tokens_per_rank = 32 rows: rank 3 holds 33"):
        check_capacity(UNEVEN, 32)
    tight = Traffic(UNEVEN.tokens, UNEVEN.total_recv, 19)
    with pytest.raises(Overflow, match="capacity R = 19 rows: rank 1 is to receive 20, rank 2 is to receive 20"):
        check_capacity(tight, 33)
