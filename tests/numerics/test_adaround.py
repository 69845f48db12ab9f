"""AdaRound: its pieces by the paper's formulas, the gradient of its solver, and its trade."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from whet.numerics import adaround as module
from whet.numerics.adaround import adaround, annealed_beta, hard, initial_variable, rectified_sigmoid, regularizer, soft
from whet.numerics.moments import reconstruction, update
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.scales import search_scale
from whet.torch.namespace import xp as torch_xp


def problem(seed: int, rows: int = 8, columns: int = 24):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, columns)) @ rng.normal(size=(columns, columns))
    weight = rng.normal(size=(rows, columns))
    return weight, reconstruction(weight, update(None, x))


def test_rectified_sigmoid_textbook() -> None:
    v = np.array([-100.0, -3.0, 0.0, 1.0, 3.0, 100.0])
    wanted = np.clip(1 / (1 + np.exp(-v)) * 1.2 - 0.1, 0, 1)
    found = rectified_sigmoid(v, xp=xp)
    np.testing.assert_allclose(found, wanted, atol=1e-15)
    assert found[0] == 0 and found[2] == pytest.approx(0.5) and found[-1] == 1 and found[1] == 0  # 1.2 σ(−3) − 0.1 < 0


def test_learning_begins_at_the_float_weight() -> None:
    fraction = np.linspace(0, 1, 101)
    v = initial_variable(fraction)
    np.testing.assert_allclose(rectified_sigmoid(v, xp=xp), fraction, atol=1e-12)
    weight = np.random.default_rng(0).uniform(-1.5, 1.5, 50)
    floor = np.floor(weight / 0.25)
    at_start = soft(initial_variable(weight / 0.25 - floor), floor, -8, 7, xp=xp)
    np.testing.assert_allclose(at_start * 0.25, weight, atol=1e-12)


def test_regularizer_textbook() -> None:
    assert regularizer(np.array([0.0, 1.0, 0.0]), 2.0, xp=xp) == 0
    assert regularizer(np.array([0.5, 0.5]), 7.0, xp=xp) == 2
    assert regularizer(np.array([0.25]), 2.0, xp=xp) == pytest.approx(0.75)


def test_beta_waits_and_falls() -> None:
    betas = [annealed_beta(step, 100) for step in range(100)]
    assert betas[:20] == [None] * 20 and betas[20] == 20.0
    assert all(a > b for a, b in itertools.pairwise(betas[20:])) and 2.0 < betas[-1] < 2.1
    assert annealed_beta(0, 1) is None and annealed_beta(5, 10, warmup=0.0) == pytest.approx(11.0)


def test_hard_rounding_takes_the_nearer_half_and_stays_in_range() -> None:
    v, floor = np.array([-1.0, 0.0, 1.0, 1.0, -1.0]), np.array([2.0, 2.0, 2.0, 7.0, -9.0])
    np.testing.assert_array_equal(hard(v, floor, -8, 7, xp=xp), [2, 3, 3, 7, -8])


def test_pieces_have_gradients_in_torch_and_equal_numpy() -> None:
    fraction = np.random.default_rng(1).random(200)
    v = torch.tensor(initial_variable(fraction), requires_grad=True)
    floor = torch.zeros(200, dtype=torch.float64)
    loss = regularizer(rectified_sigmoid(v, xp=torch_xp), 4.0, xp=torch_xp) + soft(v, floor, -8, 7, xp=torch_xp).sum()
    loss.backward()
    assert loss.item() == pytest.approx(float(regularizer(fraction, 4.0, xp=xp)) + fraction.sum())
    sigmoid = 1 / (1 + np.exp(-v.detach().numpy()))
    apart = 2 * fraction - 1
    slope = 1 - 8 * np.sign(apart) * np.abs(apart) ** 3  # d/dh of h + 1 − |2h − 1|⁴
    np.testing.assert_allclose(v.grad.numpy(), slope * 1.2 * sigmoid * (1 - sigmoid), rtol=1e-9)
    codes = hard(v.detach(), floor, -8, 7, xp=torch_xp)
    np.testing.assert_array_equal(codes.numpy(), hard(v.detach().numpy(), np.zeros(200), -8, 7, xp=xp))


@pytest.mark.parametrize("polish", [False, True])
def test_the_trade_weight_error_up_output_error_down(polish) -> None:
    weight, quadratic = problem(2)
    scale = search_scale(weight, -4, 3)
    found = adaround(weight, scale, quadratic, -4, 3, steps=500, polish=polish)
    nearest = np.clip(np.round(weight / scale), -4, 3) * scale
    assert np.sum((found.weight - weight) ** 2) > np.sum((nearest - weight) ** 2)
    assert found.error.sum() < 0.55 * found.nearest_error.sum()
    assert np.all(found.error <= found.nearest_error + 1e-9)
    np.testing.assert_allclose(found.error, quadratic.error(found.codes * scale))
    if not polish:
        np.testing.assert_array_equal(found.error, found.learned_error)
        inside = np.abs(weight / scale) < 3
        assert np.max(np.abs(found.codes - weight / scale)[inside]) <= 1  # one of the two neighbours


def test_it_finds_nearly_the_best_of_all_roundings() -> None:
    """Against every one of 2^10 roundings up or down."""
    weight, quadratic = problem(3, rows=3, columns=10)
    found = adaround(weight, 0.5 * np.ones((3, 1)), quadratic, -8, 7, steps=500)
    floor = np.clip(np.floor(weight / 0.5), -8, 6)
    best = np.full(3, np.inf)
    for up in itertools.product((0, 1), repeat=10):
        best = np.minimum(best, quadratic.error((floor + np.array(up)) * 0.5))
    assert np.mean(found.error / best) < 1.5 < np.mean(found.nearest_error / best)


def test_the_solver_descends_along_the_true_gradient(monkeypatch) -> None:
    """Without regularizer and with the codes kept soft, learning reaches what least squares can."""
    weight, quadratic = problem(4, rows=4, columns=6)
    monkeypatch.setattr(module, "annealed_beta", lambda step, steps: None)
    losses = []
    monkeypatch.setattr(
        module, "hard", lambda v, floor, low, high, xp: losses.append((v.copy(), floor)) or hard(v, floor, low, high, xp=xp)
    )
    shifted = weight + 0.2  # the solver begins elsewhere than at the bottom
    adaround(shifted, 0.5 * np.ones((4, 1)), quadratic, -8, 7, steps=3000, learning_rate=0.05, polish=False)
    v, floor = losses[0]
    at_end = quadratic.error(soft(v, floor, -8, 7, xp=xp) * 0.5)
    assert at_end.sum() < 0.2 * quadratic.error(shifted).sum()


def test_masks_groups_and_determinism() -> None:
    weight, quadratic = problem(5)
    mask = np.random.default_rng(6).random(weight.shape) < 0.5
    scale = search_scale(weight, -8, 7, group_size=7)
    one, two = (adaround(weight * mask, scale, quadratic, -8, 7, group_size=7, mask=mask, steps=50) for _ in range(2))
    assert np.all(one.codes[~mask] == 0) and one.codes.min() >= -8 and one.codes.max() <= 7
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_allclose(one.weight, one.codes * np.repeat(scale, 7, axis=1)[:, :24])


def test_dead_inputs_and_zero_weights() -> None:
    weight, _ = problem(7)
    quadratic = reconstruction(weight, update(None, np.zeros((3, 24))))
    found = adaround(weight, np.full((8, 1), 0.3), quadratic, -8, 7, steps=20)
    np.testing.assert_array_equal(found.codes, np.clip(np.round(weight / 0.3), -8, 7))
    zeros = adaround(weight * 0, np.full((8, 1), 2.0**-60), problem(7)[1], -8, 7, steps=20)
    assert np.all(np.isfinite(zeros.weight))
