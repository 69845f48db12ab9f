"""AdaRound: rounding up or down is learned (Nagel et al. 2020, arXiv:2004.10568).

The pieces are functions over `xp`, for sides that have gradients; `adaround` solves one layer from its moments, in NumPy, where
the gradient is known in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from whet.numerics.descent import coordinate_descent
from whet.numerics.moments import Float64s, Floats, Quadratic, mean_diagonal
from whet.numerics.namespace import Array, Namespace, numpy_namespace
from whet.numerics.rounders import Codes, expand_groups, integer_rounder, with_mask

ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched to [γ, ζ], so that it reaches 0 and 1 (the paper's section 4)


def rectified_sigmoid(v: Array, *, xp: Namespace) -> Array:
    """`h(V) = clip(σ(V) (ζ − γ) + γ, 0, 1)`: how far up each weight is rounded (eq. 23)."""
    return xp.clip(_sigmoid(v, xp) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def initial_variable(fraction: Floats) -> Floats:
    """`V` with `h(V) = fraction`, for `fraction = w/s − ⌊w/s⌋` in [0, 1]: learning begins at the float weight."""
    inside = (fraction - GAMMA) / (ZETA - GAMMA)
    return np.asarray(np.log(inside) - np.log(1.0 - inside), fraction.dtype)


def regularizer(h: Array, beta: float, *, xp: Namespace) -> Array:
    """`Σ 1 − |2h − 1|^β`: 0 where every h is 0 or 1 (eq. 24)."""
    return xp.sum(1.0 - xp.abs(2.0 * h - 1.0) ** beta)


def annealed_beta(step: int, steps: int, *, high: float = 20.0, low: float = 2.0, warmup: float = 0.2) -> float | None:
    """β at `step` of `steps`: None (no regularizer) during `warmup`, then from `high` to `low` along half a cosine."""
    begin = warmup * steps
    if step < begin:
        return None
    done = (step - begin) / max(steps - begin, 1.0)
    return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def hard(v: Array, floor: Array, qmin: int, qmax: int, *, xp: Namespace) -> Array:
    """The codes at the end: `clip(⌊w/s⌋ + [h(V) ≥ ½], qmin, qmax)`, in the dtype of `floor`."""
    up = xp.cast(rectified_sigmoid(v, xp=xp) >= 0.5, "float32")
    return xp.clip(floor + up, float(qmin), float(qmax))


def soft(v: Array, floor: Array, qmin: int, qmax: int, *, xp: Namespace) -> Array:
    """The real-valued codes while learning: `clip(⌊w/s⌋ + h(V), qmin, qmax)` (eq. 22)."""
    return xp.clip(floor + rectified_sigmoid(v, xp=xp), float(qmin), float(qmax))


@dataclass(frozen=True, slots=True, eq=False)
class AdaRounded:
    """codes, weight: (rows, columns).

    Mean squared error of each output row, (rows,): nearest_error, rounded to nearest; learned_error, after learning; error, as
    returned, after coordinate descent.
    """

    codes: Codes
    weight: Float64s
    nearest_error: Float64s
    learned_error: Float64s
    error: Float64s


def adaround(
    weight: Floats,
    scale: Floats,
    quadratic: Quadratic,
    qmin: int,
    qmax: int,
    *,
    group_size: int | None = None,
    mask: Floats | None = None,
    steps: int = 1000,
    learning_rate: float = 0.05,
    strength: float = 0.3,
    polish: bool = True,
) -> AdaRounded:
    """Codes of `weight` (rows, columns) whose rounding up or down is learned on the layer's output error.

    scale: (rows, 1) or (rows, groups), zero point 0. The error of a row is counted in squared steps,
    `E / (s² mean(diag H))`, and `strength` times the regularizer is added; Adam takes `steps` steps along
    `2 s (Ŵ H − B) h'(V)`, the exact gradient. With a weaker regularizer codes are undecided at the end, and chance rounds
    them. There is nothing random in it. polish: coordinate descent at the end, whose codes may leave the two neighbours
    of a weight. A row never ends worse than rounded to nearest.
    """
    exact = np.asarray(weight, np.float64)
    shape = (exact.shape[0], exact.shape[1])
    step = np.asarray(scale, np.float64) if group_size is None else expand_groups(scale, group_size, shape[1])
    step = np.broadcast_to(step, shape)
    kept = np.ones(shape) if mask is None else (np.asarray(mask) != 0).astype(np.float64)
    rounder = integer_rounder(scale, qmin, qmax, shape=shape, group_size=group_size)
    rounder = rounder if mask is None else with_mask(rounder, kept)
    nearest_codes, nearest = rounder(exact, np.arange(shape[1]))
    nearest_error = quadratic.error(nearest)
    codes = _learn(exact, step, kept, quadratic, (qmin, qmax), steps, learning_rate, strength)
    learned = codes * step
    learned_error = quadratic.error(learned)
    worse = (learned_error > nearest_error)[:, None]
    codes, learned = np.where(worse, nearest_codes, codes), np.where(worse, nearest, learned)
    if polish:
        codes, found = coordinate_descent(codes, learned, quadratic, rounder)
        learned = np.asarray(found, np.float64)
    return AdaRounded(codes, learned, nearest_error, learned_error, quadratic.error(learned))


def _learn(
    exact: Float64s,
    step: Float64s,
    kept: Float64s,
    quadratic: Quadratic,
    limits: tuple[int, int],
    steps: int,
    learning_rate: float,
    strength: float,
) -> Codes:
    """Adam (Kingma & Ba 2014) on V; the codes at its end."""
    floor = np.floor(exact / step)
    v = np.asarray(initial_variable(np.clip(exact / step - floor, 0.0, 1.0)), np.float64)
    unit = 1.0 / (np.mean(step**2, axis=1, keepdims=True) * mean_diagonal(quadratic.hessian))
    first, second = np.zeros_like(v), np.zeros_like(v)
    for t in range(steps):
        sigmoid = 1.0 / (1.0 + np.exp(-v))
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        h = np.clip(stretched, 0.0, 1.0)
        codes = floor + h
        passes = (stretched > 0) & (stretched < 1) & (codes > limits[0]) & (codes < limits[1])
        value = np.clip(codes, *limits) * step * kept
        slope = 2.0 * unit * step * (value @ quadratic.hessian - quadratic.linear)
        beta = annealed_beta(t, steps)
        if beta is not None:
            apart = 2.0 * h - 1.0
            slope -= strength * beta * 2.0 * np.sign(apart) * np.abs(apart) ** (beta - 1.0)
        gradient = slope * passes * sigmoid * (1.0 - sigmoid) * (ZETA - GAMMA)
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient**2 - second)
        corrected = first / (1.0 - 0.9 ** (t + 1))
        v = np.clip(v - learning_rate * corrected / (np.sqrt(second / (1.0 - 0.999 ** (t + 1))) + 1e-12), -20.0, 20.0)
    return (np.asarray(hard(v, floor, *limits, xp=numpy_namespace)) * kept).astype(np.int32)


def _sigmoid(v: Array, xp: Namespace) -> Array:
    return 1.0 / (1.0 + xp.exp(-xp.clip(v, -30.0, 30.0)))
