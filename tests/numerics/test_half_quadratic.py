"""HQQ: the shrinkage by its definition, and an error that falls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.numerics.half_quadratic import half_quadratic, shrink


def test_shrinkage_textbook() -> None:
    np.testing.assert_allclose(shrink(np.array([4.0, -4.0, 0.01, 0.0]), 1.0, 0.5), [3.5, -3.5, 0.0, 0.0])
    np.testing.assert_allclose(shrink(np.array([2.0]), 4.0, 1.0), [1.75])  # p = 1 is soft thresholding


def values(found, group: int | None, columns: int) -> np.ndarray:
    size = columns if group is None else group
    scale, zero = (np.repeat(a, size, axis=1)[:, :columns] for a in (found.scale, found.zero_point))
    return (found.codes - zero) * scale


@pytest.mark.parametrize("fit_scale", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_falls_on_heavy_tails(bits, fit_scale) -> None:
    weight = np.random.default_rng(bits).standard_t(4, size=(8, 128)) * 0.02 + 0.01
    found = half_quadratic(weight, bits, group_size=64, fit_scale=fit_scale)
    assert np.all(found.after <= found.before) and found.after.mean() < 0.99 * found.before.mean()
    missed = np.abs(weight - values(found, 64, 128)) ** 0.7
    np.testing.assert_allclose(found.after, missed.reshape(8, 2, 64).mean(axis=2), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 20),
    group=st.one_of(st.none(), st.integers(1, 24)),
    kind=st.sampled_from(["normal", "constant", "zero", "positive", "tiny"]),
    integer=st.booleans(),
)
def test_shapes_and_edges(rows, columns, group, kind, integer) -> None:
    weight = np.random.default_rng(columns).normal(size=(rows, columns))
    weight = {
        "normal": weight,
        "constant": weight * 0 + 0.3,
        "zero": weight * 0,
        "positive": np.abs(weight) + 5,
        "tiny": weight * 1e-12,
    }[kind]
    found = half_quadratic(weight, 4, group_size=group, integer_zero_point=integer)
    assert found.codes.shape == weight.shape and found.codes.min() >= 0 and found.codes.max() <= 15
    assert found.scale.shape == (rows, -(-columns // (group or columns)))
    if integer:
        np.testing.assert_array_equal(found.zero_point, np.round(found.zero_point))
    back = values(found, group, columns)
    assert np.all(np.isfinite(back)) and np.max(np.abs(back - weight)) <= np.ptp(weight) / 15 + 0.01 * np.max(np.abs(weight))


def test_groups_do_not_see_each_other() -> None:
    weight = np.random.default_rng(0).normal(size=(2, 30))
    whole = half_quadratic(weight, 3, group_size=10)
    for index in range(3):
        alone = half_quadratic(weight[:, index * 10 : index * 10 + 10], 3)
        np.testing.assert_array_equal(whole.codes[:, index * 10 : index * 10 + 10], alone.codes)
        np.testing.assert_allclose(whole.zero_point[:, [index]], alone.zero_point)
