"""Integer kernels' arithmetic in float32: against Python's own integers, and on every array library."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.numerics.integers import SumMultipliers, fixed_point_sum, requantization_factor, requantize, sum_multipliers
from whet.numerics.namespace import numpy_namespace as xp

scales = st.floats(2.0**-12, 10, width=32)
codes = st.lists(st.integers(-255, 255), min_size=1, max_size=40)


def by_integers(left, right, numbers: SumMultipliers):
    return [
        (a * numbers.left + b * numbers.right + (1 << (numbers.shift - 1))) >> numbers.shift
        for a, b in zip(left, right, strict=True)
    ]


@given(codes, codes, scales, scales, scales)
def test_a_sum_equals_the_one_in_integers(left, right, left_scale, right_scale, scale):
    numbers = sum_multipliers(left_scale, right_scale, scale, 21)
    if numbers is None:
        assert not 2**-10 <= np.float32(max(left_scale, right_scale)) / np.float32(scale) < 256
        return
    left, right = left[: len(right)], right[: len(left)]
    found = fixed_point_sum(np.asarray(left, np.float32), np.asarray(right, np.float32), numbers, xp=xp)
    assert found.dtype == np.float32
    assert found.tolist() == by_integers(left, right, numbers)


def test_the_greater_multiplier_has_its_bits_and_the_edges_are_the_kernels():
    assert sum_multipliers(1.0, 0.5, 1.0, 21) == SumMultipliers(1 << 20, 1 << 19, 20)
    assert sum_multipliers(0.25, 0.75, 1.0, 21) == SumMultipliers(1 << 19, 3 << 19, 21)
    assert sum_multipliers(2.0**-10, 0.0, 1.0, 21) == SumMultipliers(1 << 20, 0, 30)
    assert sum_multipliers(2.0**-11, 0.0, 1.0, 21) is None
    assert sum_multipliers(255.0, 1.0, 1.0, 21).shift == 13 and sum_multipliers(256.0, 1.0, 1.0, 21) is None


def test_halves_of_a_sum_go_up_and_those_of_an_accumulator_to_even():
    numbers = sum_multipliers(0.5, 0.5, 1.0, 21)
    one, zero = np.asarray([-3, -1, 1, 3], np.float32), np.zeros(4, np.float32)
    assert fixed_point_sum(one, zero, numbers, xp=xp).tolist() == [-1, 0, 1, 2]
    assert requantize(one, np.float32(1), np.float32(0.5), xp=xp).tolist() == [-2, 0, 0, 2]


def test_a_multiplier_is_rounded_where_float_arithmetic_is_not():
    """16 bits less: the rounded multiplier is 22/64 for 0.34, and 127 times the difference is half a code."""
    numbers = sum_multipliers(0.34, 0.0, 1.0, 5)
    assert numbers == SumMultipliers(22, 0, 6)
    assert by_integers([127], [0], numbers) == [44] and round(127 * 0.34) == 43


def test_accumulators_lose_their_float_errors_before_they_are_scaled():
    step, scale = np.float32(3e-4), np.float32(0.02)
    factor = requantization_factor(step, scale)
    whole = np.arange(-60_000, 60_000, 7, dtype=np.float32)
    noisy = whole * step * (1 + np.float32(2e-6) * np.sign(np.sin(whole)).astype(np.float32))
    np.testing.assert_array_equal(requantize(noisy, step, factor, xp=xp), np.round(whole * factor))
    assert np.any(np.round(noisy / scale) != np.round(whole * factor))  # what rounding the noisy values gives


def test_factors_that_kernels_refuse_have_no_rule():
    assert requantization_factor(np.float32(256), np.float32(1)) is None
    assert requantization_factor(np.asarray([1, 2.0**-33], np.float32), np.float32(1)) is None
    assert requantization_factor(np.asarray([1, 2.0**-32], np.float32), np.float32(1)).tolist() == [1, 2.0**-32]


def test_all_libraries_agree_bit_for_bit():
    torch = pytest.importorskip("torch")
    from whet.torch.namespace import xp as torch_xp

    rng = np.random.default_rng(0)
    left, right = (rng.integers(-255, 256, 50_000).astype(np.float32) for _ in range(2))
    numbers = sum_multipliers(0.0273, 0.0311, 0.0402, 21)
    expected = fixed_point_sum(left, right, numbers, xp=xp)
    assert expected.tolist() == by_integers(left.astype(int).tolist(), right.astype(int).tolist(), numbers)
    found = fixed_point_sum(torch.from_numpy(left), torch.from_numpy(right), numbers, xp=torch_xp)
    np.testing.assert_array_equal(found.numpy(), expected)
    keras = pytest.importorskip("keras")
    from whet.keras.namespace import xp as keras_xp

    found = fixed_point_sum(keras.ops.convert_to_tensor(left), keras.ops.convert_to_tensor(right), numbers, xp=keras_xp)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found), expected)
