"""Masks: exact counts, ties by position, and no dead layer."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from whet.numerics.criteria import magnitude
from whet.numerics.masks import mask_lowest, masks_for, removed_count
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs import Global, Uniform
from whet.torch.namespace import TorchNamespace

scores = arrays(np.float32, array_shapes(max_dims=4, max_side=5), elements=st.sampled_from([0.0, 0.25, 1.0, 2.0, 1e-40, 3e38]))


def test_the_lowest_magnitudes_go() -> None:
    weight = np.asarray([[0.1, -0.9], [-0.2, 0.3]], np.float32)
    np.testing.assert_array_equal(mask_lowest(magnitude(weight, xp=xp), 2, xp=xp), [[0, 1], [0, 1]])


def test_of_ties_the_first_go() -> None:
    np.testing.assert_array_equal(mask_lowest(np.asarray([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]), 4, xp=xp), [0, 0, 0, 1, 0, 1])


@given(scores=scores, share=st.floats(0, 1))
def test_masks_are_those_of_the_rank(scores, share) -> None:
    """The definition: the rank of every score in a stable order, ties by position."""
    count = round(share * scores.size)
    rank = np.argsort(np.argsort(scores.ravel(), kind="stable"), kind="stable").reshape(scores.shape)
    np.testing.assert_array_equal(mask_lowest(scores, count, xp=xp), rank >= count)


def test_masks_are_selected_not_sorted() -> None:
    class Counting(type(xp)):
        calls: ClassVar[list[str]] = []

        @staticmethod
        def argsort(x):
            Counting.calls.append("sort")
            return np.argsort(x, kind="stable")

        @staticmethod
        def kth_smallest(xs, k):
            Counting.calls.append("select")
            return np.partition(np.concatenate(xs), k)[k]

    masks_for([np.arange(6.0), np.arange(4.0)], 0.5, Uniform(), xp=Counting())
    masks_for([np.arange(6.0), np.arange(4.0)], 0.5, Global(), xp=Counting())
    assert Counting.calls == ["select"] * 3


@pytest.mark.parametrize(
    ("sparsity", "size", "expected"),
    [
        (0.0, 10, 0),
        (0.8, 90, 72),
        (0.5, 5, 2),
        (0.5, 3, 2),
        (0.99, 10, 9),
        (0.999, 1, 0),
        (0.5, 1, 0),
        (0.5, 0, 0),
        (0.1, 3, 0),
    ],
)
def test_counts_round_half_to_even_and_never_take_all(sparsity, size, expected) -> None:
    assert removed_count(sparsity, size) == expected


@given(scores=scores, sparsity=st.floats(0, 0.999))
def test_uniform_removes_exactly_the_count_and_only_the_lowest(scores, sparsity) -> None:
    (mask,) = masks_for([scores], sparsity, Uniform(), xp=xp)
    assert mask.shape == scores.shape and mask.dtype == bool
    assert int(np.sum(mask == 0)) == removed_count(sparsity, scores.size)
    if np.any(mask == 0):
        assert scores[mask == 0].max() <= scores[mask == 1].min()


@given(many=st.lists(scores, min_size=1, max_size=5), sparsity=st.floats(0, 0.999))
def test_global_removes_exactly_the_count_and_spares_every_layer(many, sparsity) -> None:
    masks = masks_for(many, sparsity, Global(), xp=xp)
    total = sum(array.size for array in many)
    most = total - len(many)
    assert sum(int(np.sum(mask == 0)) for mask in masks) == min(removed_count(sparsity, total), most)
    for mask, score in zip(masks, many, strict=True):
        assert mask.shape == score.shape and mask.sum() >= 1
        assert mask.reshape(-1)[np.flatnonzero(score.reshape(-1) == score.max())].max() == 1  # one of the highest stays


def test_global_takes_most_from_the_layer_with_the_lowest_scores() -> None:
    low, high = np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([10.0, 20.0, 30.0, 40.0])
    a, b = masks_for([low, high], 0.5, Global(), xp=xp)
    np.testing.assert_array_equal(a, [0, 0, 0, 1])  # the last is spared, so that the layer lives
    np.testing.assert_array_equal(b, [0, 1, 1, 1])


def test_what_was_removed_before_goes_first_and_counts() -> None:
    weight = np.asarray([0.0, 5.0, 0.0, 1.0], np.float32)  # the third was removed before, the first is zero by chance
    score = np.where(np.asarray([1, 1, 0, 1]) == 0, -np.inf, magnitude(weight, xp=xp))
    np.testing.assert_array_equal(mask_lowest(score, 1, xp=xp), [1, 1, 0, 1])
    np.testing.assert_array_equal(mask_lowest(score, 2, xp=xp), [0, 1, 0, 1])
    both = masks_for([score, np.full(4, 9.0)], 0.25, Global(), xp=xp)
    np.testing.assert_array_equal(both[0], [0, 1, 0, 1])


@given(scores=scores, low=st.floats(0, 0.999), high=st.floats(0, 0.999))
def test_masks_of_a_rising_sparsity_are_nested(scores, low, high) -> None:
    low, high = sorted((low, high))
    (first,), (second,) = (masks_for([scores], s, Uniform(), xp=xp) for s in (low, high))
    assert np.all(second <= first)


@given(many=st.lists(scores, min_size=1, max_size=5), sparsity=st.floats(0, 0.999))
def test_global_masks_are_those_of_the_rank_of_all(many, sparsity) -> None:
    """The definition: the highest of every array, the last of equal ones, stays; of all others the lowest go, ties by place."""
    flat = [array.ravel().astype(np.float64) for array in many]
    for array in flat:
        array[np.flatnonzero(array == array.max())[-1]] = np.inf
    together = np.concatenate(flat)
    count = min(removed_count(sparsity, len(together)), len(together) - len(many))
    expected = np.argsort(np.argsort(together, kind="stable"), kind="stable") >= count
    found = masks_for(many, sparsity, Global(), xp=xp)
    np.testing.assert_array_equal(np.concatenate([mask.ravel() for mask in found]), expected)


def test_a_namespace_that_stays_where_its_arrays_are_selects_the_same() -> None:
    """As on a GPU: torch's own selection, with ties in every array."""

    class There(TorchNamespace):
        on_host = staticmethod(lambda x: None)

    rng = np.random.default_rng(0)
    many = [rng.integers(0, 4, shape).astype(np.float32) for shape in ((7, 5), (3,), (4, 4), (1,))]
    for sparsity in (0.0, 0.3, 0.7, 0.99):
        expected = masks_for(many, sparsity, Global(), xp=xp)
        found = masks_for([torch.from_numpy(array) for array in many], sparsity, Global(), xp=There())
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.numpy(), two)
