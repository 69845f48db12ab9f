"""The losses in float32 tensors of every framework against sums in float64, at all temperatures and sizes of logits."""

import math

import keras
import numpy as np
import pytest
import torch

from whet import keras as keras_side
from whet import torch as torch_side

TEMPERATURES = [0.5, 1.0, 4.0, 20.0, 100.0]
SIDES = {
    "torch": (torch_side, torch.from_numpy),
    "keras": (keras_side, keras.ops.convert_to_tensor),
}


def book(s, t, temperature):
    """`T² · mean of Σ p (log p - log q)` of rows of float64, each logarithm and sum exact to the last digits."""
    rows = []
    for a, b in zip(s / temperature, t / temperature, strict=True):
        logs = [z - z.max() - math.log(math.fsum(np.exp(z - z.max()))) for z in (a, b)]
        rows.append(math.fsum(np.exp(logs[1]) * (logs[1] - logs[0])))
    return temperature**2 * math.fsum(rows) / len(rows)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
def test_soft_targets_agree_to_five_digits(side, temperature, spread):
    """Relative to the loss, from T 0.5 to 100 and for logits up to 10⁴."""
    rng = np.random.default_rng(0)
    s, t = (rng.uniform(-spread, spread, (32, 10)).astype(np.float32) for _ in range(2))
    pieces, tensor = SIDES[side]
    found = float(pieces.soft_targets(tensor(s), tensor(t), temperature))
    assert found == pytest.approx(book(s.astype(np.float64), t.astype(np.float64), temperature), rel=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_a_student_near_its_teacher_at_a_high_temperature(side):
    """Where `Σ p log(p/q)` in float32 would be nothing but rounding errors."""
    rng = np.random.default_rng(1)
    t = rng.normal(size=(64, 10)).astype(np.float32)
    s = (t + 1e-2 * rng.normal(size=t.shape)).astype(np.float32)
    pieces, tensor = SIDES[side]
    wanted = book(s.astype(np.float64), t.astype(np.float64), 100.0)
    assert float(pieces.soft_targets(tensor(s), tensor(t), 100.0)) == pytest.approx(wanted, rel=1e-3)
