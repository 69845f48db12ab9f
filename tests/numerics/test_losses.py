"""Soft targets against the formula written out in float64."""

from __future__ import annotations

import numpy as np
import pytest

from whet.numerics.losses import soft_targets
from whet.numerics.namespace import numpy_namespace as xp


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(6, 3), (2, 5, 7), (4,)])
def test_textbook(temperature, shape) -> None:
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=shape) * 3, rng.normal(size=shape) * 3
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    wanted = temperature**2 * np.mean(np.sum(p * np.log(p / q), -1))
    assert soft_targets(student, teacher, temperature, xp=xp) == pytest.approx(wanted, rel=1e-10)


def test_equal_logits_cost_nothing_and_shifts_do_not_matter() -> None:
    logits = np.random.default_rng(2).normal(size=(3, 4))
    assert soft_targets(logits, logits, 4.0, xp=xp) == 0
    assert soft_targets(logits + 5, logits, 4.0, xp=xp) == pytest.approx(0, abs=1e-12)


def test_huge_logits_stay_finite() -> None:
    student, teacher = np.asarray([[1e4, 0.0, -1e4]], np.float32), np.asarray([[-1e4, 0.0, 1e4]], np.float32)
    assert soft_targets(student, teacher, 1.0, xp=xp) == pytest.approx(2e4)


def test_the_gradients_size_does_not_depend_on_the_temperature() -> None:
    """Hinton et al. 2015, section 2.1: T² keeps the balance; for high T the loss nears half the squared logit difference / N."""
    rng = np.random.default_rng(3)
    student, teacher = (x - x.mean(-1, keepdims=True) for x in rng.normal(size=(2, 50, 10)))
    wanted = np.mean(np.sum((student - teacher) ** 2, -1)) / (2 * 10)
    assert soft_targets(student, teacher, 1000.0, xp=xp) == pytest.approx(wanted, rel=1e-2)
