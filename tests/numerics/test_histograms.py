"""Small histograms of a weight before and after a step."""

from __future__ import annotations

import numpy as np
import pytest

from whet.numerics.histograms import BINS, histogram


def test_both_rows_count_every_value_in_the_same_bins() -> None:
    before = np.linspace(-1, 1, 640, dtype=np.float32)
    after = np.where(np.abs(before) < 0.5, 0, before)
    found = histogram(before).beside(after)
    assert found["edges"] == [-1.0, 1.0] and len(found["before"]) == len(found["after"]) == BINS
    assert sum(found["before"]) == sum(found["after"]) == 640
    assert found["before"] == [20] * BINS
    assert found["after"][BINS // 2] == 320  # zero opens the upper middle bin
    assert found["after"][:8] == [20] * 8 and found["after"][9:16] == [0] * 7


def test_values_beyond_the_edges_count_to_the_outermost_bins() -> None:
    found = histogram(np.array([-1.0, 1.0])).beside(np.array([-5.0, 7.0, 0.0, np.nan]))
    assert found["after"][0] == 1 and found["after"][-1] == 1 and sum(found["after"]) == 4


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-30, 1e30])
def test_a_constant_lies_in_the_middle(value) -> None:
    found = histogram(np.full(5, value))
    assert found.low < value < found.high
    assert sum(found.counts) == 5 and 5 in found.counts[BINS // 2 - 1 : BINS // 2 + 1]


@pytest.mark.parametrize("array", [np.zeros(0), np.array([1.0, np.nan]), np.array([np.inf, 0.0])])
def test_no_histogram_of_nothing_or_of_what_is_not_finite(array) -> None:
    assert histogram(array) is None
