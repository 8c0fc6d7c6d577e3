from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.errors import InvalidCase
from distbench.experts.selection.releases import BUCKET_RULES, CURRENT, BucketRules, padded_rows, rules_for

# rows: bucket, on both sides of every edge.
EDGES = {
    "0.1.5": {0: 1, 1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 512: 512, 513: 1024, 1023: 1024, 1024: 1024, 1025: 1024}
    | {40_000: 1024, 1 << 20: 1024},
    "0.1.8": {0: 1, 1: 16, 15: 16, 16: 16, 17: 32, 1023: 1024, 1024: 1024, 2047: 1024, 2048: 2048, 2049: 2048}
    | {16_383: 2048, 16_384: 16_384, 1 << 20: 16_384},
    "0.1.9": {0: 1, 1: 1, 2: 2, 3: 4, 9: 16, 16: 16, 17: 32, 1023: 1024, 2047: 1024, 2048: 2048, 16_383: 2048}
    | {16_384: 16_384, 1 << 20: 16_384},
    "0.1.12": {0: 1, 1: 1, 5: 8, 1025: 2048, 2049: 4096, 16_385: 32_768, 32_767: 32_768, 32_768: 32_768}
    | {131_072: 32_768, 1 << 20: 32_768},
    "0.1.14": {0: 1, 1: 1, 2: 2, 3: 4, 1025: 2048, 16_384: 16_384, 16_385: 32_768, 32_767: 32_768, 32_768: 32_768}
    | {131_071: 32_768, 131_072: 131_072, 1 << 20: 131_072},
}
EDGES |= {
    "0.1.9.post1": EDGES["0.1.9"],
    "0.1.10": EDGES["0.1.9"],
    "0.1.10.post1": EDGES["0.1.9"],
    "0.1.13": EDGES["0.1.12"],
    "0.1.16": EDGES["0.1.14"],
}
generations = pytest.mark.parametrize("rules", BUCKET_RULES.values(), ids=BUCKET_RULES)


@pytest.mark.parametrize("generation", BUCKET_RULES)
def test_buckets_change_at_the_edges_of_the_generation(generation: str) -> None:
    rules = BUCKET_RULES[generation]
    assert {rows: padded_rows(rows, rules) for rows in EDGES[generation]} == EDGES[generation]


def test_current_buckets_are_the_seventeen_of_the_reference() -> None:
    buckets = sorted({padded_rows(rows) for rows in range(140_000)})
    assert buckets == [1 << power for power in range(16)] + [131_072]


@generations
@given(rows=st.lists(st.integers(0, 1 << 22), min_size=2, max_size=2))
def test_buckets_grow_with_rows(rules: BucketRules, rows: list[int]) -> None:
    fewer, more = sorted(rows)
    assert padded_rows(fewer, rules) <= padded_rows(more, rules)


@generations
@given(rows=st.integers(1, 1 << 22))
def test_bucket_of_a_bucket_is_itself(rules: BucketRules, rows: int) -> None:
    bucket = padded_rows(rows, rules)
    assert padded_rows(bucket, rules) == bucket


@given(rows=st.integers(1, 131_072 - 1))
def test_current_bucket_is_at_least_its_rows_and_less_than_twice_below_the_first_tier(rows: int) -> None:
    bucket = padded_rows(rows)
    assert bucket == 32_768 or rows <= bucket < 2 * rows


@pytest.mark.parametrize(
    ("version", "generation"),
    [
        ("0.1.5", "0.1.5"),
        ("0.1.5.post4", "0.1.5"),
        ("0.1.7.post2.dev18", "0.1.5"),
        ("0.1.7.post5", "0.1.5"),
        ("0.1.8.dev3+g0123abc", "0.1.5"),
        ("0.1.8rc1", "0.1.5"),
        ("v0.1.8", "0.1.8"),
        ("0.1.9", "0.1.9"),
        ("0.1.9.post1.dev2", "0.1.9"),
        ("0.1.9.post1", "0.1.9.post1"),
        ("0.1.10.dev1", "0.1.9.post1"),
        ("0.1.10", "0.1.10"),
        ("0.1.10.post3", "0.1.10.post1"),
        ("0.1.11.post1", "0.1.10.post1"),
        ("0.1.12+rocm7", "0.1.12"),
        ("0.1.13.post1", "0.1.13"),
        ("v0.1.14-rc0", "0.1.13"),
        ("0.1.14", "0.1.14"),
        ("0.1.15.post3", "0.1.14"),
        ("0.1.16", "0.1.16"),
        (" 0.1.20.post1 ", "0.1.16"),
        ("0.2", "0.1.16"),
        ("1.0.0.1", "0.1.16"),
    ],
)
def test_version_uses_the_rules_of_the_last_generation_up_to_it(version: str, generation: str) -> None:
    assert rules_for(version) is BUCKET_RULES[generation]


def test_empty_version_selects_the_newest_rules() -> None:
    assert rules_for("") is CURRENT is list(BUCKET_RULES.values())[-1]


@pytest.mark.parametrize("version", ["0.1.4", "0.1.5.dev7", "0.1.5rc2", "0.0.9"])
def test_a_version_before_all_rules_is_refused(version: str) -> None:
    with pytest.raises(InvalidCase, match=r"0\.1\.5"):
        rules_for(version)


@pytest.mark.parametrize("version", ["newest", "1", "0.1.x", "0.1.5-longctx", "٠.١.٥", "0.1.5\n0", "9" * 20 + ".1"])
def test_malformed_version_is_refused_in_one_line(version: str) -> None:
    with pytest.raises(InvalidCase) as refusal:
        rules_for(version)
    assert len(str(refusal.value).splitlines()) == 1


@given(st.text())
def test_any_text_is_parsed_as_a_version_or_refused(text: str) -> None:
    try:
        rules = rules_for(text)
    except InvalidCase as error:
        refusal = str(error)
    else:
        refusal = ""
        assert rules in BUCKET_RULES.values()
    assert len(refusal.splitlines()) < 2
