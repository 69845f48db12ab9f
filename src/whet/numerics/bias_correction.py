"""Bias correction from measured means: what quantization shifted on average is added back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whet.numerics.moments import Float64s, Floats, Moments


def bias_correction(weight: Floats, rounded: Floats, moments: Moments) -> Float64s:
    """`Δb = W E[x] − Ŵ E[x̂]`, (rows,), to add to the bias: output means are then those of the float layer.

    weight, rounded: (rows, columns) (Nagel et al. 2019, arXiv:1906.04721, eq. 15, with measured means).
    """
    after = moments.mean if moments.mean_quantized is None else moments.mean_quantized
    return np.asarray(weight, np.float64) @ moments.mean - np.asarray(rounded, np.float64) @ after


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """`scale · y + shift`, each (channels,)."""

    scale: Float64s
    shift: Float64s


def reestimated_affine(
    mean: Floats, variance: Floats, quantized_mean: Floats, quantized_variance: Floats, *, epsilon: float = 1e-5
) -> Affine:
    """The affine map that gives a quantized layer's outputs the float layer's mean and variance, per channel.

    `scale = √((v + ε) / (v̂ + ε))`, `shift = m − scale · m̂`: what re-estimating a batch norm behind the layer does. ε is
    counted in the layer's largest variance, so that a channel that is constant in both keeps scale 1.
    """
    floor = epsilon * max(float(np.max(variance, initial=0.0)), np.finfo(np.float64).tiny)
    ratio = (np.asarray(variance, np.float64) + floor) / (np.asarray(quantized_variance, np.float64) + floor)
    scale = np.sqrt(ratio)
    return Affine(scale, np.asarray(mean, np.float64) - scale * np.asarray(quantized_mean, np.float64))
