"""Order of versions, and texts that are none."""

from __future__ import annotations

import itertools

import pytest

from distbench.utils.versions import release_of

ASCENDING = (
    *("0.1.dev1+g123", "0.1.5.dev7", "0.1.5rc2", "0.1.5", "0.1.5.post4", "0.1.7.post2.dev18+gabc", "0.1.7.post2"),
    *("0.1.9.post1.dev2", "0.1.9.post1", "v0.1.14-rc0", "0.1.14", "0.2", "1.0.0.1"),
)


@pytest.mark.parametrize(("lower", "higher"), list(itertools.pairwise(ASCENDING)))
def test_versions_are_in_pep_440_order(lower: str, higher: str) -> None:
    first, second = release_of(lower), release_of(higher)
    assert first is not None
    assert second is not None
    assert first < second


@pytest.mark.parametrize("text", ["0.1.7+gabc", " 0.1.7 ", "v0.1.7", "0.1.7.0"])
def test_local_version_and_spelling_do_not_matter(text: str) -> None:
    assert release_of(text) == release_of("0.1.7")


@pytest.mark.parametrize("tail", [".1", ".dev1", ".post1", "rc1"])
def test_number_of_ten_digits_is_no_part_of_a_release(tail: str) -> None:
    assert release_of(f"0.1{tail}234567890") is None
    assert release_of(f"0.1{tail}23456789") is not None


@pytest.mark.parametrize(
    "text",
    ["", "newest", "1", "20260101", "1!0.1.7", "1.2.3.4.5", "0.1.5-longctx", "٠.١.٥", "0.1.5\n0", "0." + "9" * 5000],
)
def test_text_that_is_no_release_has_no_version(text: str) -> None:
    assert release_of(text) is None
