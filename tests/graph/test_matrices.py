"""Weights as matrices and back, and rounders of any solved quantizer."""

import numpy as np
import pytest

from whet.graph.matrices import Layout, rounders, steps, zero_codes
from whet.graph.views import WeightView
from whet.graph.weights import solve_weight
from whet.specs import Int, PerChannel, PerGroup, PerTensor
from whet.specs.schemes import NF4, KMeans, PowerOfTwo

LAYOUTS = {
    "torch linear": Layout((6, 8), 0, 1),
    "linear (in, out)": Layout((8, 6), 1, 0),
    "torch conv": Layout((6, 4, 3, 3), 0, 1),
    "keras conv": Layout((3, 3, 4, 6), 3, 2),
    "grouped": Layout((6, 4, 3), 0, 1, groups=2),
    "keras depthwise": Layout((3, 3, 1, 8), 3, None, groups=4),
    "transposed": Layout((4, 6, 3, 3), 1, 0, transposed=True),
    "grouped transposed": Layout((4, 3, 3, 2), 1, 0, groups=2, transposed=True),
    "keras transposed": Layout((3, 3, 6, 4), 2, 3, transposed=True),
}


@pytest.mark.parametrize("where", LAYOUTS.values(), ids=list(LAYOUTS))
def test_there_and_back(where):
    array = np.arange(np.prod(where.shape)).reshape(where.shape)
    matrices = where.matrices(array)
    assert matrices.shape[0] == where.groups and matrices.shape[0] * matrices.shape[1] == where.outputs
    np.testing.assert_array_equal(where.array(matrices), array)


def test_rows_are_outputs_and_columns_keep_the_order_of_the_other_axes():
    where = LAYOUTS["keras conv"]
    array = np.arange(np.prod(where.shape)).reshape(where.shape)
    np.testing.assert_array_equal(where.matrices(array)[0, 5], array[..., 5].ravel())


SCHEMES = [
    Int(4),
    Int(8, granularity=PerTensor()),
    Int(4, symmetric=False, granularity=PerChannel()),
    Int(3, granularity=PerGroup(3)),
    Int(4, symmetric=False, granularity=PerGroup(3)),
    NF4(granularity=PerGroup(3)),
    KMeans(3, granularity=PerChannel()),
    KMeans(2, granularity=PerGroup(3)),
    PowerOfTwo(4),
]


@pytest.mark.parametrize("spec", SCHEMES, ids=repr)
@pytest.mark.parametrize("name", ["torch linear", "keras conv", "torch conv", "grouped", "grouped transposed"])
def test_the_rounder_of_a_quantizer_rounds_as_it_does(spec, name):
    where = LAYOUTS[name]
    array = np.random.default_rng(1).normal(size=where.shape).astype(np.float32)
    array.flat[::5] = 0
    params = solve_weight(WeightView("w", "l", array, where.out_axis, where.in_axis), spec)
    wanted, exact = where.matrices(params.encode(array)), where.matrices(array)
    values = where.matrices(params.decode(params.encode(array)))
    for g, rounder in enumerate(rounders(params, where)):
        for columns in (np.arange(exact.shape[2]), np.asarray([exact.shape[2] - 1, 0])):
            codes, rounded = rounder(exact[g][:, columns], columns)
            np.testing.assert_array_equal(codes, wanted[g][:, columns])
            np.testing.assert_allclose(rounded, values[g][:, columns], rtol=1e-6, atol=1e-7)
    zeros = params.decode(where.array(zero_codes(params, where)).astype(np.int32))
    assert np.all(np.abs(zeros) <= np.abs(array).max() / 2)


def test_steps_are_those_of_every_weight():
    where = LAYOUTS["torch linear"]
    array = np.random.default_rng(1).normal(size=where.shape).astype(np.float32)
    params = solve_weight(WeightView("w", "l", array, 0, 1), Int(4, symmetric=False, granularity=PerGroup(3)))
    scale, zero = steps(params, where)
    codes = params.encode(array)
    np.testing.assert_allclose(where.array((where.matrices(codes) - zero) * scale), params.decode(codes), rtol=1e-6)
