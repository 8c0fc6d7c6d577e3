"""Quantiles of Student's t."""

from __future__ import annotations

import pytest

from distbench.utils.stats import student_quantile, student_tail


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 31.821), (2, 6.965), (3, 4.541), (4, 3.747), (9, 2.821), (30, 2.457)]
)
def test_students_t_quantile_equals_published_tables(freedom: int, value: float) -> None:
    assert student_quantile(0.01, freedom) == pytest.approx(value, abs=1e-3)
    assert student_tail(value, freedom) == pytest.approx(0.01, rel=1e-3)
    assert student_tail(-value, freedom) == pytest.approx(0.99, rel=1e-3)
