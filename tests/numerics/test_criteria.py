"""Importance scores against their formulas, by hand and in float64."""

import numpy as np
import pytest
import torch

from whet.errors import SpecError
from whet.numerics import criteria
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs import OBS, SNIP, Activation, BatchNormScale, Fisher, Magnitude, Movement, Taylor, UserCriterion, Wanda
from whet.torch.namespace import xp as torch_xp

W = np.asarray([[0.5, -2.0], [1.0, 0.0]])
G = np.asarray([[4.0, 0.5], [-1.0, 3.0]])


def test_scores_of_single_weights_by_hand() -> None:
    np.testing.assert_array_equal(criteria.taylor(W, G, xp=xp), [[2, 1], [1, 0]])
    np.testing.assert_array_equal(criteria.movement(W, -G), [[-2, 1], [1, 0]])
    np.testing.assert_array_equal(criteria.fisher(W, G**2), [[2, 0.5], [0.5, 0]])
    np.testing.assert_array_equal(criteria.wanda(W, np.asarray([[2.0, 3.0]] * 2), xp=xp), [[1, 6], [2, 0]])


def test_taylor_is_the_first_order_change_of_a_loss() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(64, 5)), rng.normal(size=5)
    y = x @ w + 0.3 * rng.normal(size=64)

    def loss(v):
        return float(np.mean((x @ v - y) ** 2))

    gradient = 2 * x.T @ (x @ w - y) / 64
    for i in range(5):
        step = np.eye(5)[i] * w * 1e-6
        assert criteria.taylor(w, gradient, xp=xp)[i] * 1e-6 == pytest.approx(abs(loss(w) - loss(w - step)), rel=1e-3)


def test_obs_is_the_least_loss_of_removing_a_weight() -> None:
    """`min_δ δᵀ H δ / 2` with w_c + δ_c = 0, against the solved constrained problem; `H = 2 X Xᵀ`."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 40))
    h, w = 2 * x @ x.T, rng.normal(size=(1, 6))
    scores = criteria.obs(w, np.diag(np.linalg.inv(h)))
    for c in range(6):
        rest = [i for i in range(6) if i != c]
        best = np.linalg.lstsq(x[rest].T, w[0] @ x, rcond=None)[0]
        assert scores[0, c] / 2 == pytest.approx(np.sum((best @ x[rest] - w[0] @ x) ** 2), rel=1e-9)


def test_geometric_median_by_its_definition() -> None:
    filters = np.random.default_rng(2).normal(size=(7, 12))
    direct = [sum(np.linalg.norm(a - b) for b in filters) for a in filters]
    np.testing.assert_allclose(criteria.geometric_median(filters), direct, rtol=1e-7)
    filters[3] = filters.mean(0)
    assert criteria.geometric_median(filters).argmin() == 3


def test_group_norms_and_normalisation() -> None:
    parts = [np.asarray([9.0, 1.0]), np.asarray([16.0, 3.0])]
    np.testing.assert_array_equal(criteria.group_norm(parts, 2), [5, 2])
    np.testing.assert_array_equal(criteria.group_norm(parts, 1), [25, 4])
    np.testing.assert_array_equal(criteria.normalised(np.asarray([1.0, 3.0])), [0.5, 1.5])
    np.testing.assert_array_equal(criteria.normalised(np.zeros(3)), np.zeros(3))


def double(weight, gradient):
    return 2 * weight


def test_the_spec_chooses_the_formula_on_every_library() -> None:
    for spec, gradient, expected in [
        (Magnitude(), None, np.abs(W)),
        (Taylor(), G, np.abs(W * G)),
        (SNIP(), G, np.abs(W * G)),
        (Fisher(), G**2, 0.5 * W**2 * G**2),
        (Movement(), G, G),
        (Activation(), G**2, G**2),
        (Wanda(), G**2, np.abs(W) * G**2),
        (OBS(), G**2, W**2 / G**2),
        (UserCriterion(double), None, 2 * W),
    ]:
        np.testing.assert_array_equal(criteria.weight_importance(spec, W, gradient, xp=xp), expected)
        given = None if gradient is None else torch.from_numpy(gradient)
        found = criteria.weight_importance(spec, torch.from_numpy(W), given, xp=torch_xp)
        np.testing.assert_array_equal(found.numpy(), expected)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SpecError, match="Taylor needs data for its gradients: pass train="):
        criteria.weight_importance(Taylor(), W, None, xp=xp)
    with pytest.raises(SpecError, match="Wanda looks at the inputs of convolutions and linear layers: pass batches as train="):
        criteria.weight_importance(Wanda(), W, None, xp=xp)
    with pytest.raises(SpecError, match=r"weight's shape \(2, 2\), got \(2,\)"):
        criteria.weight_importance(UserCriterion(lambda w, g: w[0]), W, None, xp=xp)
    with pytest.raises(SpecError, match="scores no single weights"):
        criteria.weight_importance(BatchNormScale(), W, G, xp=xp)


def test_random_scores_are_drawn_anew_for_each_weight_and_seed() -> None:
    one = criteria.random_scores(0, 0, (50, 3))
    np.testing.assert_array_equal(one, criteria.random_scores(0, 0, (50, 3)))
    assert (one != criteria.random_scores(0, 1, (50, 3))).all() and (one != criteria.random_scores(1, 0, (50, 3))).all()
