"""Order statistics of timed iterations."""

from __future__ import annotations

import random
import statistics

from distbench.samples import median_error, percentile


def test_percentiles_are_samples() -> None:
    samples = [float(value) for value in range(1, 101)]
    assert (percentile(samples, 99), percentile(samples, 50), percentile([7.0], 99)) == (99.0, 50.0, 7.0)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(5)
    held = 0
    for _ in range(1000):
        samples = [draw.expovariate(1.0) for _ in range(40)]
        error = median_error(samples)
        assert error is not None
        middle = statistics.median(samples)
        held += abs(middle - 0.6931) <= 1.3 * error * middle
    assert held > 900


def test_few_samples_tell_no_error_and_equal_ones_none() -> None:
    assert median_error([1.0] * 5) is None
    assert median_error([3.0] * 20) == 0.0
