"""One weight's quantizer: every scheme at every granularity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet import HQQ, MSE, NF4, Float, Int, KMeans, MinMax, PerChannel, PerGroup, PerTensor, Piecewise, PowerOfTwo
from whet.errors import SpecError
from whet.graph.views import WeightView
from whet.graph.weights import by_scale, layout_of, reduced, solve_weight

SHAPES = {
    "linear": ((6, 21), 0, 1),
    "conv": ((4, 10, 3, 3), 0, 1),
    "keras": ((3, 3, 10, 4), 3, 2),
    "depthwise": ((3, 3, 1, 8), 3, None),
}
GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(4)]


def schemes(granularity):
    return [
        Int(8, granularity=granularity),
        Int(4, granularity=granularity),
        Int(4, symmetric=False, granularity=granularity),
        KMeans(3, granularity=granularity),
        NF4(granularity=granularity),
        PowerOfTwo(4, granularity=granularity),
        PowerOfTwo(5, terms=2, granularity=granularity),
        Piecewise(4, granularity=granularity),
        Float("float8_e4m3"),
    ]


def view(kind="linear", seed=0, zeros=True):
    shape, out_axis, in_axis = SHAPES[kind]
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if zeros:
        array.flat[::3] = 0
    return WeightView("w", "layer", array, out_axis, in_axis)


def error(params, array):
    return float(np.mean(np.square(params.decode(params.encode(array)) - array, dtype=np.float64)))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=["tensor", "channel", "group"])
@pytest.mark.parametrize("kind", SHAPES)
def test_zero_stays_zero_and_rounding_twice_is_rounding_once(kind, granularity):
    weight = view(kind)
    for spec in schemes(granularity):
        params = solve_weight(weight, spec)
        once = params.decode(params.encode(weight.array))
        assert once.dtype == np.float32 and once.shape == weight.array.shape
        assert np.all(once.flat[::3] == 0), spec
        assert np.array_equal(params.decode(params.encode(once)), once), spec
        codes = params.encode(weight.array)
        assert codes.max() - codes.min() < 2**params.bits, spec


@pytest.mark.parametrize("kind", SHAPES)
def test_finer_scales_lose_less(kind):
    weight = view(kind, zeros=False)
    for index in range(len(schemes(PerTensor())) - 1):  # 8-bit floats have scales per channel alone
        tensor, channel, group = (error(solve_weight(weight, schemes(g)[index]), weight.array) for g in GRANULARITIES)
        assert channel < tensor * 1.15 and group <= channel * 1.001


def test_per_group_by_hand():
    array = np.asarray([[1, -7, 14, 2, 3], [7, 0, 0.5, -3.5, 0.1]], np.float32)
    params = solve_weight(WeightView("w", "l", array, 0, 1), Int(4, granularity=PerGroup(2)))
    assert np.allclose(params.scale, [[1, 2, 3 / 7], [1, 0.5, 0.1 / 7]])
    assert params.encode(array).tolist() == [[1, -7, 7, 1, 7], [7, 0, 1, -7, 7]]
    assert np.allclose(params.decode(params.encode(array)), [[1, -7, 14, 2, 3], [7, 0, 0.5, -3.5, 0.1]])


def test_groups_of_both_layouts_are_the_same_numbers():
    torch, keras = view("conv"), None
    keras = WeightView("k", "l", np.ascontiguousarray(torch.array.transpose(2, 3, 1, 0)), 3, 2)
    for spec in schemes(PerGroup(4)):
        one, other = solve_weight(torch, spec), solve_weight(keras, spec)
        assert np.array_equal(one.encode(torch.array), other.encode(keras.array).transpose(3, 2, 0, 1)), spec


@pytest.mark.parametrize(
    "spec", [Int(4), Int(3, granularity=PerGroup(4)), Int(4, symmetric=False), Int(4, symmetric=False, granularity=PerTensor())]
)
def test_least_squares_is_not_worse_than_min_max(spec):
    for kind in SHAPES:
        weight = view(kind, zeros=False)
        assert error(solve_weight(weight, spec, MSE()), weight.array) <= error(
            solve_weight(weight, spec, MinMax()), weight.array
        )


def test_half_quadratic_forgives_outliers_and_needs_zero_points():
    weight = view("linear", zeros=False)
    weight.array[:, 0] = 9
    spec = Int(4, symmetric=False)
    bulk = weight.array[:, 1:]

    def lost(observer):
        params = solve_weight(weight, spec, observer)
        missed = np.abs(params.decode(params.encode(weight.array)) - weight.array)
        assert np.all(params.zero_point >= 0) and np.all(params.zero_point <= 15)
        return float(np.mean(missed[:, 1:] ** 0.7))

    assert lost(HQQ()) <= lost(MinMax()) and bulk.size
    with pytest.raises(SpecError, match="symmetric=False"):
        solve_weight(weight, Int(4), HQQ())
    with pytest.raises(SpecError, match="HQQ ranges Int weights"):
        solve_weight(weight, NF4(), HQQ())


def test_a_16_bit_float_is_no_codebook():
    with pytest.raises(SpecError, match="cast"):
        solve_weight(view(), Float("float16"))


def test_a_group_of_more_than_all_features_is_one_group():
    assert layout_of(view("linear"), PerGroup(128)) == (0, (1, 21))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    size=st.integers(2, 7),
    axes=st.permutations([0, 1]),
    at=st.integers(0, 2),
)
def test_by_scale_sees_the_values_that_share_a_scale(shape, size, axes, at):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    layout = [(None, None), (axes[0], None), (axes[0], (axes[1], size))][at]
    (least,) = by_scale(array, layout, lambda rows: (rows.min(axis=1),))
    assert np.array_equal(least, reduced(array, layout, np.minimum)) and least.shape == reduced(array, layout, np.minimum).shape


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(1e-30, 1e30),
    constant=st.booleans(),
    index=st.integers(0, 8),
    granularity=st.sampled_from(GRANULARITIES),
)
def test_any_size_of_weights_gives_finite_values(scale, constant, index, granularity):
    array = np.full((3, 9), scale, np.float32) if constant else view("linear").array[:, :9] * np.float32(scale)
    params = solve_weight(WeightView("w", "l", array, 0, 1), schemes(granularity)[index])
    rounded = params.decode(params.encode(array))
    assert np.all(np.isfinite(rounded))
    assert np.abs(rounded - array).max() <= np.abs(array).max() * 1.01
