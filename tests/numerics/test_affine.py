"""Uniform quantization: the textbook's numbers, then properties that hold for every finite range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.numerics.affine import (
    INT32_MAX,
    SCALE_FLOOR,
    QParams,
    dequantize,
    fake_quantize,
    fit_scale_to_bias,
    qparams,
    quantize,
    quantize_bias,
)
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs import Int, PerTensor

UINT8 = Int(8, symmetric=False, granularity=PerTensor())
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 1e-20, 1e20, 1e38, -1e38, 3e38, -3e38]
finite = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e38, 1e38))
specs = st.builds(
    lambda bits, symmetric, narrow: Int(bits, symmetric=symmetric, narrow=narrow if symmetric else None),
    st.integers(2, 16),
    st.booleans(),
    st.sampled_from([None, True, False]),
)


def f32(x: object) -> np.ndarray:
    return np.asarray(x, np.float32)


def test_code_ranges() -> None:
    assert (Int(8).qmin, Int(8).qmax) == (-127, 127)
    assert (Int(8, narrow=False).qmin, Int(8, narrow=False).qmax) == (-128, 127)
    assert (Int(4).qmin, Int(4).qmax) == (-8, 7)  # four bits are too few to give one away
    assert (Int(5).qmin, Int(5).qmax) == (-15, 15)
    assert (UINT8.qmin, UINT8.qmax) == (0, 255)
    assert (Int(16, symmetric=False).qmax, Int(2).qmin, Int(2).qmax) == (65535, -2, 1)


def test_textbook_asymmetric() -> None:
    """Jacob et al. 2018, section 3: [-1, 1.55] in 8 bits has scale 0.01 and zero point 100."""
    scale, zero_point = qparams(f32(-1.0), f32(1.55), UINT8, xp=xp)
    assert scale == pytest.approx(0.01, rel=1e-6) and zero_point == 100
    x = f32([-1.0, 0.0, 0.004, 0.016, 1.55, 7.0, -7.0])
    np.testing.assert_array_equal(quantize(x, scale, zero_point, UINT8, xp=xp), [0, 100, 100, 102, 255, 255, 0])
    np.testing.assert_allclose(dequantize(f32([0, 100, 255]), scale, zero_point), [-1.0, 0.0, 1.55], rtol=1e-6)


def test_textbook_symmetric() -> None:
    scale, zero_point = qparams(f32(-2.54), f32(1.0), Int(8), xp=xp)
    assert scale == pytest.approx(0.02, rel=1e-6) and zero_point == 0


def test_float64_gives_the_same_up_to_its_own_precision() -> None:
    rng = np.random.default_rng(0)
    low, high = -rng.random(100) * 5, rng.random(100) * 5
    scale64, zero64 = qparams(low, high, UINT8, xp=xp)
    np.testing.assert_allclose(scale64, (high - low) / 255, rtol=1e-15)
    np.testing.assert_array_equal(zero64, np.round(-low / scale64))
    scale32, _ = qparams(f32(low), f32(high), UINT8, xp=xp)
    np.testing.assert_allclose(scale32, scale64, rtol=1e-6)


def test_rounding_is_half_to_even() -> None:
    x = f32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    np.testing.assert_array_equal(quantize(x, f32(1), f32(0), Int(8), xp=xp), [0, 2, 2, 0, -2, -2])
    # The zero point is added after rounding, as the runtimes do: an odd one does not turn the halves around.
    np.testing.assert_array_equal(quantize(x, f32(1), f32(7), UINT8, xp=xp), [7, 9, 9, 7, 5, 5])


@pytest.mark.parametrize(("low", "high"), [(2.0, 6.0), (-6.0, -2.0)])
def test_a_range_on_one_side_is_widened_to_hold_zero(low, high) -> None:
    scale, zero_point = qparams(f32(low), f32(high), UINT8, xp=xp)
    assert scale == f32(6 / 255) and zero_point == (0 if low > 0 else 255)


@pytest.mark.parametrize("spec", [Int(8), UINT8])
def test_an_empty_range_gives_exact_zeros(spec) -> None:
    scale, zero_point = qparams(f32(0), f32(0), spec, xp=xp)
    assert scale == SCALE_FLOOR and zero_point == 0
    np.testing.assert_array_equal(fake_quantize(np.zeros(3, np.float32), scale, zero_point, spec, xp=xp), 0)


@given(a=finite, b=finite, spec=specs)
def test_zero_is_represented_exactly(a, b, spec) -> None:
    scale, zero_point = qparams(f32(min(a, b)), f32(max(a, b)), spec, xp=xp)
    assert (
        np.isfinite(scale)
        and scale >= SCALE_FLOOR
        and spec.qmin <= zero_point <= spec.qmax
        and zero_point == np.round(zero_point)
    )
    assert dequantize(quantize(f32(0), scale, zero_point, spec, xp=xp), scale, zero_point) == 0


@settings(max_examples=300)
@given(a=finite, b=finite, at=st.floats(0, 1), spec=specs)
def test_the_error_inside_the_range_is_at_most_half_a_step(a, b, at, spec) -> None:
    low, high = sorted((float(f32(a)), float(f32(b))))
    x = f32(low + at * (high - low))
    scale, zero_point = qparams(f32(low), f32(high), spec, xp=xp)
    codes = quantize(x, scale, zero_point, spec, xp=xp)
    assert spec.qmin <= codes <= spec.qmax and codes == np.round(codes)
    step = np.float64(scale)
    error = abs(np.float64(codes - zero_point) * step - np.float64(x))
    # Half a step, and what float32 rounds in x / scale, in the scale and in the zero point.
    assert error <= step * (0.5 + 3e-7 * (spec.qmax - spec.qmin))


@given(a=finite, b=finite, spec=specs, seed=st.integers(0, 99))
def test_quantizing_twice_changes_nothing(a, b, spec, seed) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    x = f32(np.random.default_rng(seed).uniform(low / 2, high / 2, 20))
    scale, zero_point = qparams(f32(low), f32(high), spec, xp=xp)
    once = quantize(x, scale, zero_point, spec, xp=xp)
    again = quantize(dequantize(once, scale, zero_point), scale, zero_point, spec, xp=xp)
    np.testing.assert_array_equal(once, again)


@given(seed=st.integers(0, 999), spec=specs)
def test_fake_quantize_is_bitwise_dequantize_of_quantize(seed, spec) -> None:
    x = f32(np.random.default_rng(seed).normal(size=50) * 3)
    scale, zero_point = qparams(f32(-2.0), f32(1.0), spec, xp=xp)
    wanted = dequantize(quantize(x, scale, zero_point, spec, xp=xp), scale, zero_point)
    np.testing.assert_array_equal(fake_quantize(x, scale, zero_point, spec, xp=xp), wanted)


def test_the_whole_float32_range_has_a_finite_scale() -> None:
    top = np.finfo(np.float32).max
    scale, zero_point = qparams(f32(-top), f32(top), UINT8, xp=xp)
    assert np.isfinite(scale) and zero_point in (127, 128)


@pytest.mark.parametrize(("axis", "shape"), [(0, (3, 1, 1)), (1, (1, 3, 1)), (-1, (1, 1, 3))])
def test_broadcast_puts_the_channels_on_their_axis(axis, shape) -> None:
    params = QParams(np.ones(3, np.float32), np.zeros(3, np.int32), Int(8), axis)
    assert tuple(array.shape for array in params.broadcast((3, 3, 3))) == (shape, shape)
    assert QParams(f32(1), np.asarray(0, np.int32), Int(8)).broadcast((3, 3, 3))[0].shape == ()


def test_bias_codes_are_exact_at_the_product_of_the_scales() -> None:
    codes = quantize_bias(f32([1.0, -0.3, 0.25]), f32(0.5), f32([0.25, 0.1, 0.001]))
    np.testing.assert_array_equal(codes, [8, -6, 500])
    assert codes.dtype == np.int32


def test_bias_codes_saturate_instead_of_wrapping() -> None:
    np.testing.assert_array_equal(quantize_bias(f32([1e9, -1e9]), f32(1e-6), f32(1e-6)), [INT32_MAX, -INT32_MAX])


@given(bias=st.floats(-1e20, 1e20), source=st.floats(1e-10, 1e3), weight=st.floats(1e-18, 1e3))
def test_a_raised_scale_always_has_room_for_the_bias(bias, source, weight) -> None:
    scale = fit_scale_to_bias(f32([weight]), source, f32([bias]))
    assert scale.dtype == np.float32 and scale[0] >= f32(weight)
    codes = quantize_bias(f32([bias]), f32(source), scale)
    assert abs(int(codes[0])) <= INT32_MAX // 2 * (1 + 1e-5)
    if abs(bias) < source * weight * 2**29:
        assert scale[0] == f32(weight)  # never raised without need
