"""Uniform affine quantization: `x ≈ scale * (q - zero_point)` (Jacob et al. 2018, arXiv:1712.05877, eq. 1).

Rules: codes round half to even; zero is always represented exactly; a scale is never below `SCALE_FLOOR`, so that an
all-zero range gives exact zeros and the product of two scales is still a normal float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whet.numerics.namespace import Array, Namespace, numpy_namespace
from whet.specs.schemes import Int

SCALE_FLOOR = 2.0**-60
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class QParams:
    """A solved quantizer, as plain arrays.

    scale: float32, of shape () per tensor or (channels,) per channel; per group it has the tensor's dimensions, with the
    number of groups on the group axis and 1 on axes without scales of their own. zero_point: int32, the same shape, in the
    code range of `spec` (0 when symmetric). axis: the channel axis in the framework's own layout, None per tensor. group:
    (axis, size) per group.
    """

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    spec: Int
    axis: int | None = None
    group: tuple[int, int] | None = None

    def broadcast(self, shape: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Scale and zero point in a shape that broadcasts against a tensor of `shape`."""
        return spread(self.scale, shape, self.axis, self.group), spread(self.zero_point, shape, self.axis, self.group)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.spec.bits

    def encode(self, array: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """The nearest codes of a tensor."""
        scale, zero_point = self.broadcast(array.shape)
        codes: npt.NDArray[np.int32] = quantize(array, scale, zero_point, self.spec, xp=numpy_namespace).astype(np.int32)
        return codes

    def decode(self, codes: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """What `codes` stand for."""
        scale, zero_point = self.broadcast(codes.shape)
        values: npt.NDArray[np.float32] = dequantize(codes.astype(np.float32), scale, zero_point.astype(np.float32))
        return values


def spread(array: Array, shape: Sequence[int], axis: int | None, group: tuple[int, int] | None) -> Array:
    """Scales (or zero points) of a quantizer in a shape that broadcasts against a tensor of `shape`; see `QParams`."""
    if group is not None:
        along, size = group
        return np.take(np.repeat(array, size, axis=along), np.arange(shape[along]), axis=along)
    if axis is None:
        return array
    return array.reshape([-1 if index == axis % len(shape) else 1 for index in range(len(shape))])


def qparams(low: Array, high: Array, spec: Int, *, xp: Namespace) -> tuple[Array, Array]:
    """Scale and zero point (both float, elementwise over `low` and `high`) that cover `[low, high]` and zero.

    Symmetric: `scale = max(|low|, |high|) / qmax`, zero point 0. Asymmetric: `scale = (high - low) / (qmax - qmin)` after
    the range is widened to hold zero, and `zero_point = round(qmin - low / scale)`. Any finite float32 range is taken:
    both ends are divided before they are subtracted, which cannot overflow.
    """
    zero = low * 0
    low, high = xp.minimum(low, zero), xp.maximum(high, zero)
    if spec.symmetric:
        scale = xp.maximum(xp.maximum(-low, high) / float(spec.qmax), zero + SCALE_FLOOR)
        return scale, zero
    levels = float(spec.qmax - spec.qmin)
    scale = xp.maximum(high / levels - low / levels, zero + SCALE_FLOOR)
    return scale, xp.clip(xp.round(spec.qmin - low / scale), float(spec.qmin), float(spec.qmax))


def quantize(x: Array, scale: Array, zero_point: Array, spec: Int, *, xp: Namespace) -> Array:
    """The codes of `x`, in its own floating dtype: `clip(round(x / scale) + zero_point, qmin, qmax)`.

    16-bit floats cannot hold every code of more than 8 bits: cast `x` to float32 first.
    """
    return xp.clip(xp.round(x / scale) + zero_point, float(spec.qmin), float(spec.qmax))


def dequantize(codes: Array, scale: Array, zero_point: Array) -> Array:
    """`scale * (codes - zero_point)`."""
    return (codes - zero_point) * scale


def fake_quantize(x: Array, scale: Array, zero_point: Array, spec: Int, *, xp: Namespace) -> Array:
    """`dequantize(quantize(x))`, with the straight-through gradient: 1 inside the range, 0 where it was clipped.

    (Bengio et al. 2013, arXiv:1308.3432; clipping as in Jacob et al. 2018.)
    """
    low, high = (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale
    inside = xp.clip(x, low, high)
    return inside + xp.stop_gradient(dequantize(quantize(x, scale, zero_point, spec, xp=xp), scale, zero_point) - inside)


def dynamic_rounded(x: Array, bits: int, *, xp: Namespace) -> Array:
    """`x` rounded to unsigned codes of its own range, as ONNX's DynamicQuantizeLinear does; straight-through gradients.

    `scale = (max(x, 0) - min(x, 0)) / (2^bits - 1)`, `zero_point = round(-min / scale)`, over the whole tensor.
    """
    fixed = xp.stop_gradient(x)
    low, high = xp.min(fixed), xp.max(fixed)
    low, high = xp.minimum(low, low * 0), xp.maximum(high, high * 0)
    levels = float((1 << bits) - 1)
    scale = xp.maximum((high - low) / levels, high * 0 + SCALE_FLOOR)
    zero_point = xp.clip(xp.round(-low / scale), 0.0, levels)
    rounded = dequantize(xp.clip(xp.round(fixed / scale) + zero_point, 0.0, levels), scale, zero_point)
    return rounded + (x - fixed)


def fit_scale_to_bias(
    weight_scale: npt.NDArray[np.float32], input_scale: float, bias: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """`weight_scale`, raised where `bias / (input_scale * weight_scale)` would not fit into int32.

    Happens in channels whose weights are (nearly) zero; their codes lose nothing that was there.
    """
    least = np.abs(bias.astype(np.float64)) / (float(input_scale) * (INT32_MAX // 2))
    return np.maximum(weight_scale, least.astype(np.float32)).astype(np.float32)


def quantize_bias(
    bias: npt.NDArray[np.float32], input_scale: npt.NDArray[np.float32], weight_scale: npt.NDArray[np.float32]
) -> npt.NDArray[np.int32]:
    """int32 codes of `bias` at `input_scale * weight_scale`, as the integer kernels add it."""
    scale = np.asarray(input_scale, np.float32) * np.asarray(weight_scale, np.float32)
    codes = np.round(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(codes, -INT32_MAX, INT32_MAX).astype(np.int32)
