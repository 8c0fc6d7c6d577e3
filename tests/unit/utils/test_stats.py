"""Order statistics of timed iterations, and quantiles of Student's t."""

from __future__ import annotations

import random
import statistics

import pytest

from distbench.utils.stats import median_error, percentile, student_quantile, student_tail


def test_percentile_is_one_of_the_samples() -> None:
    samples = [float(value) for value in range(1, 101)]
    assert (percentile(samples, 99), percentile(samples, 50), percentile([7.0], 99)) == (99.0, 50.0, 7.0)


def test_median_interval_covers_the_true_median_in_over_90_percent_of_series() -> None:
    draw = random.Random(5)
    held = 0
    for _ in range(1000):
        samples = [draw.expovariate(1.0) for _ in range(40)]
        error = median_error(samples)
        assert error is not None
        middle = statistics.median(samples)
        held += abs(middle - 0.6931) <= 1.3 * error * middle
    assert held > 900


def test_median_error_is_unknown_for_five_samples_and_zero_for_equal_ones() -> None:
    assert median_error([1.0] * 5) is None
    assert median_error([3.0] * 20) == 0.0


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 31.821), (2, 6.965), (3, 4.541), (4, 3.747), (9, 2.821), (30, 2.457)]
)
def test_students_t_quantile_equals_published_tables(freedom: int, value: float) -> None:
    assert student_quantile(0.01, freedom) == pytest.approx(value, abs=1e-3)
    assert student_tail(value, freedom) == pytest.approx(0.01, rel=1e-3)
    assert student_tail(-value, freedom) == pytest.approx(0.99, rel=1e-3)
