"""Gradients of scales and weights: LSQ's, in closed form."""

import math

import numpy as np
import pytest
import torch

from whet.torch.learned import LEAST_FACTOR, Lattice, RoundThrough, rate_of


@pytest.mark.parametrize("bounds", [(-8.0, 7.0), (0.0, 15.0), (-3.0, 12.0)])
def test_gradients_are_those_of_lsq(bounds):
    rng, (low, high) = np.random.default_rng(0), bounds
    x, g, s, f = rng.normal(size=999) * 6, rng.normal(size=999), 0.7, 1.3
    v = x / (s * f)
    inside = (v >= low) & (v <= high)
    by_scale = np.sum(g * np.where(inside, np.round(v) - v, np.clip(np.round(v), low, high)))
    xs, factor = torch.tensor(x, dtype=torch.float32, requires_grad=True), torch.tensor(f, requires_grad=True)
    rate = rate_of(333, high)
    y = RoundThrough.apply(xs, torch.tensor(s), factor, None, None, Lattice(low, high, rate))
    y.backward(torch.tensor(g, dtype=torch.float32))
    np.testing.assert_allclose(y.detach(), s * f * np.clip(np.round(v), low, high), rtol=1e-5)
    np.testing.assert_allclose(xs.grad, np.where(inside, g, 0), rtol=1e-6)
    assert rate == 1 / math.sqrt(333 * high) and not inside.all()
    np.testing.assert_allclose(factor.grad, rate * by_scale / s, rtol=1e-4)


@pytest.mark.parametrize("kind", ["channels", "groups", "zero points", "masked"])
def test_gradients_of_many_scales_are_those_of_each(kind):
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=(4, 10)), rng.normal(size=(4, 10))
    size, count = (4, 3) if kind == "groups" else (10, 1)
    base = rng.uniform(0.1, 0.4, (4, count))
    zero = rng.integers(-2, 3, (4, count)) if kind == "zero points" else np.zeros((4, count))
    mask = rng.random((4, 10)) > 0.5 if kind == "masked" else np.ones((4, 10), bool)
    xs = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    factor = torch.ones(4, count, requires_grad=True)
    y = RoundThrough.apply(
        xs,
        torch.tensor(base, dtype=torch.float32),
        factor,
        torch.tensor(zero, dtype=torch.float32) if kind == "zero points" else None,
        torch.tensor(mask) if kind == "masked" else None,
        Lattice(-4, 3, 0.25, (1, size) if kind == "groups" else None),
    )
    y.backward(torch.tensor(g, dtype=torch.float32))
    wanted, into_x, into_factor = np.zeros((4, 10)), np.zeros((4, 10)), np.zeros((4, count))
    for i in range(4):
        for j in range(10):
            k = j // size
            s, low, high = base[i, k], -4 - zero[i, k], 3 - zero[i, k]
            v = x[i, j] / s if mask[i, j] else 0.0
            inside = low <= v <= high
            wanted[i, j] = s * np.clip(np.round(v), low, high)
            into_x[i, j] = g[i, j] if inside and mask[i, j] else 0.0
            into_factor[i, k] += 0.25 / s * g[i, j] * ((np.round(v) - v) if inside else np.clip(np.round(v), low, high))
    np.testing.assert_allclose(y.detach(), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(xs.grad, into_x, rtol=1e-6)
    np.testing.assert_allclose(factor.grad, into_factor, rtol=1e-4, atol=1e-5)


def test_scales_of_zero_channels_do_not_train_and_factors_have_a_floor():
    x = torch.zeros(2, 3, requires_grad=True)
    base, factor = torch.tensor([[2.0**-60], [1.0]]), torch.tensor([[1.0], [LEAST_FACTOR / 2]], requires_grad=True)
    y = RoundThrough.apply(x + 3, base, factor, None, None, Lattice(-4, 3))
    assert y[1, 0].item() == 3 * LEAST_FACTOR
    y.sum().backward()
    assert factor.grad.tolist() == [[0.0], [0.0]]  # it would shrink further
    factor.grad = None
    (-RoundThrough.apply(x + 3, base, factor, None, None, Lattice(-4, 3))).sum().backward()
    assert float(factor.grad[1, 0]) == -9.0


def test_a_step_of_sgd_moves_the_scale_as_if_it_were_trained_itself():
    x, base = torch.linspace(-1, 1, 64), torch.tensor(0.07)
    factor = torch.ones((), requires_grad=True)
    lattice = Lattice(-8, 7, 0.1)
    RoundThrough.apply(x, base, factor, None, None, lattice).square().sum().backward()
    with_one = torch.ones((), requires_grad=True)
    RoundThrough.apply(x, torch.tensor(1.0), with_one, None, None, Lattice(-8, 7, 0.1))
    v = x / base
    inside = (v >= -8) & (v <= 7)
    own = torch.where(inside, v.round() - v, v.clamp(-8, 7)) * 2 * (v.round().clamp(-8, 7) * base)
    moved = base * (1 - 0.01 * factor.grad)
    torch.testing.assert_close(moved, base - 0.01 * 0.1 * own.sum(), rtol=1e-4, atol=1e-6)
