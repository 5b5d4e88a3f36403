"""Percentiles of counted values, and the definitions of the metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podsim import metrics
from podsim.metrics import distribution, weighted_percentiles

counted = st.lists(
    st.tuples(st.floats(0, 1e6, allow_nan=False), st.integers(1, 50)), min_size=1, max_size=40
)


@given(counted, st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_percentiles_of_counted_values_are_those_of_the_repeated_values(
    pairs: list[tuple[float, int]], percentiles: list[float]
) -> None:
    values, counts = (np.array(column) for column in zip(*pairs, strict=True))
    expected = np.percentile(np.repeat(values, counts), percentiles)
    np.testing.assert_allclose(
        weighted_percentiles(values, counts, percentiles), expected, rtol=1e-12, atol=1e-12
    )


def test_a_distribution_skips_what_never_happened() -> None:
    found = distribution([1.0, np.nan, 3.0], [1, 10, 3])
    assert found["mean"] == 2.5
    assert found["p50"] == 3.0
    assert found["std"] == pytest.approx(np.std([1, 3, 3, 3]))
    assert np.isnan(distribution([])["p99"])


def test_an_interval_reaches_both_ways_from_the_first_run() -> None:
    def summary(value: float) -> dict[str, object]:
        statistics = {name: value for name in ("mean", *(f"p{p}" for p in metrics.PERCENTILES))}
        throughputs = dict.fromkeys(metrics._THROUGHPUTS, value)
        return {"podsim": dict.fromkeys(metrics.LATENCIES, statistics), **throughputs}

    def interval(*values: float) -> tuple[float, float]:
        found = metrics.intervals([summary(value) for value in values])
        assert len(set(found.values())) == 1 or any(map(math.isnan, values))
        return found["ttft_p50"]

    assert interval(2.0, 1.5, 2.25) == (1.5, 2.25)
    assert interval(2.0, 2.25, 2.5) == (1.5, 2.5), "both runs on one side"
    assert interval(2.0, 1.5, 1.75) == (1.5, 2.5)
    assert interval(1.0, 2.0, 4.0) == (0.0, 4.0), "no time is negative"
    assert interval(2.0, 2.0, 2.0) == (2.0, 2.0)
    assert all(map(math.isnan, interval(math.nan, math.nan, math.nan)))
