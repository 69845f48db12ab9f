"""n:m, block and ERK masks; regrowth; pruning that makes up for what it removes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whet.errors import DataError, SpecError
from whet.numerics.criteria import wanda
from whet.numerics.masks import block_mask, block_scores, masks_for, nm_mask, patterned, ranked_in_rows, unfit
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.obs import inverse_diagonal, sparsegpt
from whet.numerics.regrow import rigl
from whet.specs import ERK, NM, Block, Channel, Cubic, Global, Prune, Wanda, Weight
from whet.torch.namespace import xp as torch_xp


def test_two_of_four_by_hand() -> None:
    scores = np.asarray([[4.0, 1, 3, 2, 0, 0, 5, 0], [1, 1, 1, 1, 2, 1, 2, 1]])
    np.testing.assert_array_equal(nm_mask(scores, 2, 4, 1, xp=xp), [[1, 0, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 1, 0]])


@given(st.sampled_from([(1, 4), (2, 4), (3, 4), (1, 2), (4, 8)]), st.integers(0, 1), st.integers(0, 2**32 - 1))
def test_every_m_keep_n_highest_with_ties_by_position(pattern, axis, seed) -> None:
    n, m = pattern
    shape = (3, 2 * m, 2) if axis else (2 * m, 3, 2)
    scores = np.random.default_rng(seed).integers(0, 4, shape).astype(np.float32)
    mask = nm_mask(scores, n, m, axis, xp=xp)
    groups = np.moveaxis(scores, axis, -1).reshape(-1, m)
    expected = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1) >= m - n
    np.testing.assert_array_equal(np.moveaxis(mask, axis, -1).reshape(-1, m), expected)
    np.testing.assert_array_equal(nm_mask(torch.from_numpy(scores), n, m, axis, xp=torch_xp).numpy(), mask)


def test_blocks_leave_together() -> None:
    weight = np.arange(48, dtype=np.float32).reshape(4, 6, 2)
    scores = block_scores(weight, 2, 3, 0, 1, xp=xp)
    assert scores.size == 2 * 2 * 2
    (mask,) = patterned([weight], [(0, 1)], Prune(0.5, granularity=Block(2, 3)), 0.5, xp=xp)
    cut = mask.reshape(2, 2, 2, 3, 2)
    assert mask.sum() == 24 and (cut == cut[:, :1, :, :1]).all() and mask[:2].sum() == 0
    np.testing.assert_array_equal(
        block_mask(masks_for([scores], 0.5, Prune(0.5).allocation, xp=xp)[0], weight, 2, 3, 0, 1, xp=xp), mask
    )
    (other,) = patterned([torch.from_numpy(weight)], [(0, 1)], Prune(0.5, granularity=Block(2, 3)), 0.5, xp=torch_xp)
    np.testing.assert_array_equal(other.numpy(), mask)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_erk_masks_have_exactly_the_sparsity_asked_for(sparsity) -> None:
    rng = np.random.default_rng(0)
    scores = [rng.random(shape) for shape in [(16, 3, 3, 3), (32, 16, 3, 3), (10, 64)]]
    masks = masks_for(scores, sparsity, ERK(), xp=xp)
    sizes = [s.size for s in scores]
    assert sum(int((m == 0).sum()) for m in masks) == round(sparsity * sum(sizes))
    left = [m.mean() for m in masks]
    assert left[1] == min(left) and all(m.sum() >= 1 for m in masks)


def test_an_n_m_pattern_on_the_way_up_removes_fewer_of_every_m() -> None:
    scores = np.random.default_rng(3).random((2, 8))
    spec = Prune(granularity=NM(1, 4), schedule=Cubic())
    left = [int(patterned([scores], [(0, 1)], spec, s, xp=xp)[0].sum()) for s in (0.0, 0.2, 0.3, 0.6, 0.75)]
    assert left == [16, 16, 12, 8, 4] and spec.fraction == 0.75


def test_shapes_that_do_not_fit_are_named() -> None:
    assert unfit((4, 6), (0, 1), NM(2, 4)) == "its 6 inputs are no multiple of 4" and unfit((4, 8), (0, 1), NM(2, 4)) is None
    assert unfit((4, 1, 3, 3), (0, None), NM(2, 4)) == "its 1 inputs are no multiple of 4"
    assert unfit((6, 8), (0, 1), Block(4, 1)) == "its 6 × 8 channels are no multiple of 4 × 1"
    assert unfit((5, 3), (0, 1), Weight()) is None
    with pytest.raises(SpecError, match="makes tensors smaller and has no masks"):
        unfit((4, 4), (0, 1), Channel())


def test_rigl_by_hand() -> None:
    weight = np.asarray([3.0, 0.1, 2.0, 0.2, 0, 0, 0, 0])
    gradient = np.asarray([9.0, 9, 9, 9, 1, 4, 2, 3])
    mask = np.asarray([1.0, 1, 1, 1, 0, 0, 0, 0], np.float32)
    np.testing.assert_array_equal(rigl(weight, gradient, mask, 0.5, xp=xp), [1, 0, 1, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(rigl(weight, gradient, mask, 0.0, xp=xp), mask)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0.1, 0.9))
def test_rigl_keeps_the_sparsity_and_the_largest_weights(seed, fraction, density) -> None:
    rng = np.random.default_rng(seed)
    weight, gradient = rng.normal(size=(6, 7)), rng.normal(size=(6, 7))
    mask = (rng.random((6, 7)) < density).astype(np.float32)
    after = rigl(weight * mask, gradient, mask, fraction, xp=xp)
    assert after.sum() == mask.sum()
    kept, dropped = np.abs(weight[(mask > 0) & (after > 0)]), np.abs(weight[(mask > 0) & (after == 0)])
    assert not len(dropped) or not len(kept) or kept.min() >= dropped.max()
    other = rigl(torch.from_numpy(weight * mask), torch.from_numpy(gradient), torch.from_numpy(mask), fraction, xp=torch_xp)
    np.testing.assert_array_equal(other.numpy(), after)


def layer(seed=0, n=12, c=32, correlated=True):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(c, c)) if correlated else np.eye(c)
    x = mix @ rng.normal(size=(c, 400))
    return rng.normal(size=(n, c)), x


def error(weight, found, x):
    return float(np.sum(((weight - found) @ x) ** 2))


@pytest.mark.parametrize("options", [{"count": 192}, {"keep": 2, "m": 4}])
def test_sparsegpt_makes_up_for_what_it_removes(options) -> None:
    weight, x = layer()
    found, mask = sparsegpt(weight, 2 * x @ x.T, block=8, **options)
    assert (found[mask == 0] == 0).all() and (mask == 0).mean() == 0.5
    if "m" in options:
        assert (mask.reshape(12, 8, 4).sum(2) == 2).all()
    scores = np.abs(weight)
    plain = nm_mask(scores, 2, 4, 1, xp=xp) if "m" in options else masks_for([scores], 0.5, Prune(0.5).allocation, xp=xp)[0]
    assert error(weight, found, x) < 0.6 * error(weight, weight * plain, x)  # 0.53 and 0.58 of magnitude's output error
    assert np.sum((weight - found) ** 2) > np.sum((weight - weight * plain) ** 2)  # at the price of a larger weight error


def test_with_independent_inputs_sparsegpt_is_wanda_without_updates() -> None:
    weight, x = layer(correlated=False)
    h = np.diag(np.diag(2 * x @ x.T))
    found, mask = sparsegpt(weight, h, count=192, block=32, damping=0.0)
    np.testing.assert_allclose(found, weight * mask, atol=1e-12)
    scores = wanda(weight, np.sqrt(np.diag(h)), xp=xp)
    np.testing.assert_array_equal(mask, masks_for([scores], 0.5, Prune(0.5).allocation, xp=xp)[0])


def test_one_column_removed_is_the_least_squares_solution() -> None:
    weight, x = layer(n=1, c=6)
    h = 2 * x @ x.T
    found, mask = sparsegpt(weight, h, count=1, block=6, damping=0.0)
    gone = int(np.flatnonzero(mask[0] == 0)[0])
    right = np.arange(6) > gone  # columns to the left are frozen
    lost = weight[0, right] @ x[right] + weight[0, gone] * x[gone]
    best = np.linalg.lstsq(x[right].T, lost, rcond=None)[0]
    np.testing.assert_allclose(found[0, right], best, rtol=1e-6)


def test_a_hessian_that_cannot_be_used_is_refused_and_a_dead_input_is_not() -> None:
    weight, x = layer()
    with pytest.raises(DataError, match=r"must be finite and \(32, 32\)"):
        sparsegpt(weight, np.full((32, 32), np.nan))
    x[3] = 0
    found, _ = sparsegpt(weight, 2 * x @ x.T, count=100)
    assert np.isfinite(found).all()


@given(st.integers(0, 1000), st.integers(0, 200), st.sampled_from([3, 8, 32]), st.floats(0, 0.9))
def test_sparsegpt_removes_exactly_the_count_and_what_was_removed_before(seed, more, block, before) -> None:
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(8, 30)), rng.normal(size=(30, 40))
    gone = rng.random((8, 30)) < before
    count = min(int(gone.sum()) + more, 239)
    found, mask = sparsegpt(weight * ~gone, x @ x.T, count=count, removed=gone, block=block)
    assert (mask == 0).sum() == count and not mask[gone].any() and not found[mask == 0].any()


def test_sparsegpt_in_n_m_keeps_what_was_removed_before_removed() -> None:
    weight, x = layer()
    gone = np.zeros(weight.shape, bool)
    gone[:, ::4] = True
    _, mask = sparsegpt(weight * ~gone, x @ x.T, keep=2, m=4, removed=gone)
    assert not mask[gone].any() and (mask.reshape(12, 8, 4).sum(2) == 2).all()


def test_the_inverse_diagonal_is_that_of_the_damped_inverse() -> None:
    _, x = layer()
    h = x @ x.T
    damped = h + 0.1 * np.diag(h).mean() * np.eye(32)
    np.testing.assert_allclose(inverse_diagonal(h, 0.1), np.diag(np.linalg.inv(damped)), rtol=1e-9)


def test_ranks_within_rows_by_hand() -> None:
    scores = np.float32([[3, 1, 1], [9, 8, 7]])
    np.testing.assert_array_equal(ranked_in_rows(scores, 0, xp=xp), [[2, 0, 1], [2, 1, 0]])
    np.testing.assert_array_equal(ranked_in_rows(scores, 1, xp=xp), [[0, 0, 0], [1, 1, 1]])
    scores[1, 0] = -np.inf
    np.testing.assert_array_equal(ranked_in_rows(scores, 0, xp=xp), [[2, 0, 1], [-np.inf, 2, 1]])


@given(st.integers(0, 1000), st.floats(0, 0.99))
def test_wanda_removes_as_many_of_each_output_to_one(seed, sparsity) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random((3, 5, 4)).astype(np.float32) * np.float32([1, 100, 10000])[:, None, None]
    for axis in (0, 1):
        turned = np.moveaxis(scores, 0, axis)
        (mask,) = patterned([turned], [(axis, 1 - axis)], Prune(sparsity, criterion=Wanda()), sparsity, xp=xp)
        lost = (np.moveaxis(mask, axis, 0) == 0).sum((1, 2))
        assert (mask == 0).sum() == min(round(60 * sparsity), 59) and lost.max() - lost.min() <= 1
        other = patterned(
            [torch.from_numpy(turned.copy())], [(axis, 1 - axis)], Prune(sparsity, criterion=Wanda()), sparsity, xp=torch_xp
        )
        np.testing.assert_array_equal(other[0].numpy(), mask)
    globally = Prune(sparsity, criterion=Wanda(), allocation=Global())
    (mask,) = patterned([scores], [(0, 1)], globally, sparsity, xp=xp)
    np.testing.assert_array_equal(mask, masks_for([scores], sparsity, Global(), xp=xp)[0])
