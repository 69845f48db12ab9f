"""What is solved, behind a batch norm: the numbers of the norm that give it, and the weights' size."""

import numpy as np
import pytest

from whet.graph.reconstruction import Normed, Solved
from whet.graph.views import WeightView

EPSILON = 1e-3


@pytest.mark.parametrize("out_axis", [0, 1])
@pytest.mark.parametrize("has_bias", [True, False])
def test_in_inference_the_layer_and_its_norm_give_what_was_solved(out_axis, has_bias):
    rng = np.random.default_rng(0)
    x, solution, bias = rng.normal(1.0, 2.0, (400, 6)), rng.normal(size=(4, 6)), rng.normal(size=4)
    solution[:, 2] = 0.0  # this input leaves
    rows = np.asarray([True, True, False, True])
    made = x @ solution.T
    old = Normed(
        rng.normal(size=(4, 6) if out_axis == 0 else (6, 4)),
        rng.normal(size=4) if has_bias else None,
        *(rng.normal(size=4), rng.uniform(0.5, 2, 4), rng.normal(size=4), rng.normal(size=4)),
    )
    weight = (solution if out_axis == 0 else solution.T).astype(np.float32)
    solved = Solved(weight, bias.astype(np.float32), rows, made.mean(0), made.var(0))
    found = old.with_solved(solved, WeightView("w", "layer", weight, out_axis, 1 - out_axis), EPSILON)
    matrix = found.weight if out_axis == 0 else found.weight.T
    sums = x @ matrix.T + (0.0 if found.bias is None else found.bias)
    outputs = found.scale * (sums - found.mean) / np.sqrt(found.variance + EPSILON) + found.shift
    np.testing.assert_allclose(outputs[:, rows], (made + bias)[:, rows], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums[:, rows].mean(0), found.mean[rows], atol=1e-5)  # as a training step finds them
    np.testing.assert_allclose(sums[:, rows].var(0), found.variance[rows], rtol=1e-5)
    before = old.weight if out_axis == 0 else old.weight.T
    kept = np.arange(6) != 2
    np.testing.assert_allclose(np.linalg.norm(matrix[rows], axis=1), np.linalg.norm(before[rows][:, kept], axis=1), rtol=1e-5)
    for name in ("mean", "variance", "scale", "shift"):
        assert getattr(found, name)[2] == getattr(old, name)[2]  # this output leaves: nothing of it changes
