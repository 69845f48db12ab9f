"""What integer kernels make of accumulators and sums, in float32 and to the last bit.

A simulation in float meets the runtime's codes only up to rounding errors of 1e-7, and each value that these push over the
middle between two codes is a code off, which spreads from layer to layer. Convolutions and dense layers: the accumulator is
an integer, and its code is that times one float32 factor. Sums: XNNPACK multiplies with integers of 21 bits and rounds
halves up (https://github.com/google/XNNPACK, src/microparams-init.c, `xnn_init_qs8_add_minmax_scalar_params`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

import numpy as np
import numpy.typing as npt

from whet.numerics.affine import QParams
from whet.numerics.namespace import Array, Namespace

LEAST_FACTOR, FACTOR_LIMIT = 2.0**-32, 256.0  # between these XNNPACK takes requantization factors
LEAST_RATIO, RATIO_LIMIT = 2.0**-10, 256.0  # and the greater ratio of a sum's scales
_LOW = 11  # a multiplier is split at this bit, so that products with codes stay exact in float32


def requantization_factor(step: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
    """What integer kernels multiply accumulators with: `step / scale` in float32; None where kernels take no such factor.

    step: what a unit of the accumulator stands for, `input scale · weight scale`, (channels,) or (). scale: the output's, ().
    """
    factor = np.asarray(np.asarray(step, np.float32) / np.asarray(scale, np.float32), np.float32)
    fits = bool(np.all(factor >= LEAST_FACTOR)) and bool(np.all(factor < FACTOR_LIMIT))
    return factor if fits else None


def requantize(x: Array, step: Array, factor: Array, *, xp: Namespace) -> Array:
    """Codes, before the zero point is added, of accumulators: `round(round(x / step) · factor)`, halves to even.

    x: accumulators in real units, off by float rounding errors. step, factor: broadcast against x.
    """
    return xp.round(xp.round(x / step) * factor)


@dataclass(frozen=True, slots=True)
class SumMultipliers:
    """The integers of a sum of two: `codes = (a · left + b · right + 2^(shift-1)) >> shift`."""

    left: int
    right: int
    shift: int


def sum_multipliers(left: float, right: float, scale: float, bits: int) -> SumMultipliers | None:
    """The multipliers for inputs of scales `left` and `right` and an output of `scale`: the greater one has `bits` bits.

    None where the ratios of the scales are beyond what the kernels take.
    """
    one = np.float32(left) / np.float32(scale)
    other = np.float32(right) / np.float32(scale)
    most = max(float(one), float(other))
    if not LEAST_RATIO <= most < RATIO_LIMIT:
        return None
    shift = bits - frexp(most)[1]  # most = m · 2^e with m in [1/2, 1)
    scaled = [int(np.rint(np.ldexp(np.float64(ratio), shift))) for ratio in (one, other)]
    return SumMultipliers(scaled[0], scaled[1], shift)


def fixed_point_sum(left: Array, right: Array, multipliers: SumMultipliers, *, xp: Namespace) -> Array:
    """Codes, before the zero point is added, of a sum of two; inputs are integers within ±255, in float32.

    `floor((left · m_l + right · m_r) / 2^shift + 1/2)`, exactly: each multiplier is taken apart, `m = high · 2^11 + low`,
    since float32 holds integers of 24 bits.
    """
    unit = 1 << _LOW
    high = left * float(multipliers.left // unit) + right * float(multipliers.right // unit)
    low = left * float(multipliers.left % unit) + right * float(multipliers.right % unit)
    total = high + xp.floor(low / float(unit))
    return xp.floor(total / 2.0 ** (multipliers.shift - _LOW) + 0.5)


_TIE = 1e-4  # what float arithmetic may take from a mean that is half a code


def round_away(x: Array, params: QParams, *, xp: Namespace) -> Array:
    """Codes, before the zero point is added, of averages of codes: halves of the signed codes go away from zero.

    LiteRT's average pooling does so; x: the average in real units.
    """
    zero_point = float(params.zero_point) - (0.0 if params.spec.symmetric else 2.0 ** (params.spec.bits - 1))
    signed = x / float(params.scale) + zero_point
    size = xp.floor(xp.abs(signed) + (0.5 + _TIE))
    return xp.where(signed < 0, -size, size) - zero_point
