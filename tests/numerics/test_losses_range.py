"""Every distillation loss in float32 against its sum in float64: temperatures 0.5 to 100, logits to 10⁴, in each framework."""

from __future__ import annotations

import numpy as np
import pytest

import loss_books as books
from whet.numerics.losses_layers import layer_loss
from whet.numerics.losses_table import logit_loss
from whet.numerics.namespace import numpy_namespace


@pytest.fixture(scope="module")
def expected():
    return books.expected()


def of_numpy():
    of_logits = lambda spec, s, t, labels: logit_loss(spec, s, t, labels, xp=numpy_namespace)  # noqa: E731
    return of_logits, lambda spec, s, t: layer_loss(spec, s, t, xp=numpy_namespace), np.asarray


def of_torch():
    torch = pytest.importorskip("torch")
    from whet.torch import distillation_loss, layer_loss

    return distillation_loss, layer_loss, torch.from_numpy


def of_keras():
    keras = pytest.importorskip("keras")
    from whet.keras import distillation_loss, layer_loss

    return distillation_loss, layer_loss, keras.ops.convert_to_tensor


@pytest.mark.parametrize("side", [of_numpy, of_torch, of_keras])
def test_float32_agrees_with_the_sum_in_float64(side, expected) -> None:
    found = books.computed(*side())
    assert len(expected) == 4 * (3 * 5 + 4) and all(value > 0 for value in expected.values())
    far = {name: (value, expected[name]) for name, value in found.items() if value != pytest.approx(expected[name], rel=1e-5)}
    assert found.keys() == expected.keys() and not far
