"""Scaling channels before quantization so that weights, or activations, are easier to quantize; the function stays the same.

For a positive `s` per channel between two layers, `W₂ x = (W₂ diag(s)) (x / s)`, and `1 / s` moves into the layer before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from whet.errors import SpecError
from whet.numerics.moments import Float64s, Floats

RANGE_FLOOR = 1e-8  # of the largest range: a channel below it is dead and stays as it is


def cross_layer_factors(range_out: Floats, range_in: Floats) -> Float64s:
    """`s_i = √(r₁ᵢ r₂ᵢ) / r₂ᵢ = √(r₁ᵢ / r₂ᵢ)`, (channels,) (Nagel et al. 2019, arXiv:1906.04721, eq. 11).

    range_out r₁: largest |w| that makes channel i, in the layer before. range_in r₂: largest |w| that reads it. Divide the
    layer before (and its bias) by `s`, multiply the layer behind: both ranges become `√(r₁ r₂)`. Valid where what lies
    between them is positively homogeneous, `f(s x) = s f(x)`: ReLU, LeakyReLU, max and average pooling, not ReLU6 or GELU. Dead
    channels get 1.
    """
    first, second = np.asarray(range_out, np.float64), np.asarray(range_in, np.float64)
    if first.shape != second.shape:
        raise SpecError(f"Both layers must share their channels, got ranges of shapes {first.shape} and {second.shape}.")
    alive = (first > RANGE_FLOOR * np.max(first, initial=0.0)) & (second > RANGE_FLOOR * np.max(second, initial=0.0))
    return np.where(alive, np.sqrt(np.where(alive, first, 1.0) / np.where(alive, second, 1.0)), 1.0)


def equalize(first: Floats, bias: Floats | None, second: Floats) -> tuple[Float64s, Float64s | None, Float64s, Float64s]:
    """`(W₁ / s, b₁ / s, W₂ s, s)` of two dense layers in a row.

    first: (channels, inputs). bias: (channels,). second: (outputs, channels).
    """
    factors = cross_layer_factors(np.max(np.abs(first), axis=1), np.max(np.abs(second), axis=0))
    scaled = None if bias is None else np.asarray(bias, np.float64) / factors
    return np.asarray(first, np.float64) / factors[:, None], scaled, np.asarray(second, np.float64) * factors, factors


def smooth_factors(activation_absmax: Floats, weight_absmax: Floats, alpha: float = 0.5) -> Float64s:
    """`s_j = max|x_j|^α / max|w_j|^(1−α)`, (columns,) (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, eq. 4).

    Inputs are divided by `s`, weight columns multiplied. alpha: how much of the difficulty moves from activations to weights,
    0 to 1. weight_absmax: over all layers that read the same input. Columns that are never
    used, or whose weights are zero, get 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise SpecError(f"alpha must be in [0, 1], got {alpha}. SmoothQuant uses 0.5, or 0.75 for strong outliers.")
    x, w = np.asarray(activation_absmax, np.float64), np.asarray(weight_absmax, np.float64)
    alive = (x > 0) & (w > 0)
    factors = np.where(alive, x, 1.0) ** alpha / np.where(alive, w, 1.0) ** (1.0 - alpha)
    return np.where(alive, np.clip(factors, 1e-5, 1e5), 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class NormalMoments:
    """mean and variance, (channels,), of a clipped normal variable."""

    mean: Float64s
    variance: Float64s


def clipped_normal(mean: Floats, deviation: Floats, low: float = 0.0, high: float = math.inf) -> NormalMoments:
    """Moments of `clip(x, low, high)` for normal `x` (Nagel et al. 2019, eq. 19 and appendix C).

    mean, deviation: (channels,), what a batch norm gives: its β and |γ|. low = 0 is ReLU, high = 6 ReLU6. With
    `a = (low − μ) / σ`, `b = (high − μ) / σ`: `E = σ (φ(a) − φ(b)) + μ (Φ(b) − Φ(a)) + low Φ(a) + high (1 − Φ(b))`.
    """
    mu, sigma = np.asarray(mean, np.float64), np.maximum(np.abs(np.asarray(deviation, np.float64)), 1e-30)
    a, b = (low - mu) / sigma, (high - mu) / sigma
    below, above = _cumulative(a), 1.0 - _cumulative(b)
    inside = 1.0 - below - above
    at_a, at_b = _density(a), _density(b)
    left = 0.0 if math.isinf(low) else low * below
    right = 0.0 if math.isinf(high) else high * above
    first = sigma * (at_a - at_b) + mu * inside + left + right
    tail_a = 0.0 if math.isinf(low) else (low + mu) * at_a
    tail_b = 0.0 if math.isinf(high) else (high + mu) * at_b
    second = (mu**2 + sigma**2) * inside + sigma * (tail_a - tail_b)
    second = second + (0.0 if math.isinf(low) else low**2 * below) + (0.0 if math.isinf(high) else high**2 * above)
    return NormalMoments(np.asarray(first, np.float64), np.asarray(np.maximum(second - first**2, 0.0), np.float64))


def analytic_bias_correction(weight: Floats, rounded: Floats, input_mean: Floats) -> Float64s:
    """`Δb = (W − Ŵ) E[x]`, (rows,), to add to the bias, without data (Nagel et al. 2019, section 4.2).

    weight, rounded: (rows, columns). input_mean: (columns,), from `clipped_normal` of the batch norm before.
    """
    return (np.asarray(weight, np.float64) - np.asarray(rounded, np.float64)) @ np.asarray(input_mean, np.float64)


def absorb_bias(mean: Floats, deviation: Floats, times: float = 3.0) -> Float64s:
    """`c = max(0, β − 3 γ)`, (channels,): what of a bias may move behind a ReLU that hardly ever clips it (section 4.1.3)."""
    return np.maximum(0.0, np.asarray(mean, np.float64) - times * np.abs(np.asarray(deviation, np.float64)))


def _density(x: Float64s) -> Float64s:
    return np.asarray(np.exp(-0.5 * np.square(x)) / math.sqrt(2.0 * math.pi), np.float64)


def _cumulative(x: Float64s) -> Float64s:
    return np.asarray([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in np.ravel(x)], np.float64).reshape(np.shape(x))
