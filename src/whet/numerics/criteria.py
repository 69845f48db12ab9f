"""Importance scores: what is smallest goes first. Every function is pure and gives one score for each weight or channel.

Legend: w weight, g ∂L/∂w, x inputs of the layer, n rows, c columns (inputs of the weight), m filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import SpecError
from whet.numerics.namespace import Array, Namespace
from whet.specs.criteria import Fisher, Magnitude, Taylor, UserCriterion

Floats = npt.NDArray[np.float64]


def magnitude(weight: Array, *, xp: Namespace) -> Array:
    """`|w|` (Han et al. 2015, arXiv:1506.02626). Same shape as `weight`."""
    return xp.abs(weight)


def taylor(weight: Array, gradient: Array, *, xp: Namespace) -> Array:
    """`|w · g|`: first-order change of the loss when `w` is removed (Molchanov et al. 2019, arXiv:1906.10771, eq. 8)."""
    return xp.abs(weight * gradient)


def snip(weight: Array, gradient: Array, *, xp: Namespace) -> Array:
    """`|w · g| / Σ |w · g|`, the connection sensitivity (Lee et al. 2019, arXiv:1810.02340, eq. 6); sums to 1."""
    sensitivity = xp.abs(weight * gradient)
    total = xp.sum(sensitivity)
    return sensitivity / xp.where(total == 0, xp.full_like(total, 1.0), total)


def movement(weight: Array, gradient: Array) -> Array:
    """`-w · g` of one step: positive where training moves `w` away from zero (Sanh et al. 2020, arXiv:2005.07683, eq. 4).

    The score of a weight is the sum over steps.
    """
    return -(weight * gradient)


def fisher(weight: Array, squared_gradient: Array) -> Array:
    """`½ w² E[g²]`: second-order change of the loss with the diagonal Fisher matrix for the Hessian.

    LeCun et al. 1989 (Optimal Brain Damage), eq. 5; E[g²] as in Theis et al. 2018, arXiv:1801.05787, eq. 7.
    """
    return 0.5 * weight * weight * squared_gradient


def wanda(weight: Array, input_norm: Array, *, xp: Namespace) -> Array:
    """`|w| · ‖x‖₂`, to be compared within a row (Sun et al. 2024, arXiv:2306.11695, eq. 1).

    Shapes: weight (n, c), input_norm (c,), the norm of every input feature over examples and tokens.
    """
    return xp.abs(weight) * input_norm


def obs(weight: Floats, inverse_hessian: Floats) -> Floats:
    """`w² / [H⁻¹]_cc`: the loss of removing `w` when the others make up for it (Hassibi & Stork 1993; arXiv:2301.00774, eq. 3).

    Shapes: weight (n, c), inverse_hessian (c, c) of `H = 2 X Xᵀ`, shared by all rows.
    """
    scores: Floats = weight**2 / np.diag(inverse_hessian)
    return scores


def random_scores(seed: int, index: int, shape: Sequence[int]) -> Floats:
    """Scores without meaning, for the weight number `index`: the same on every array library."""
    return np.random.default_rng((seed, index)).random(tuple(shape))


def weight_importance(criterion: Any, weight: Array, gradient: Array | None, *, xp: Namespace) -> Array:
    """The score of every weight under `criterion`; for `Random` see `random_scores`.

    gradient: ∂L/∂w, for Fisher E[(∂L/∂w)²]; None without data.

    Raises:
        SpecError: the criterion needs a gradient and there is none, or a user's function returns another shape.
    """
    match criterion:
        case Magnitude():
            return magnitude(weight, xp=xp)
        case UserCriterion():
            scores = criterion.fn(weight, gradient)
            if tuple(getattr(scores, "shape", ())) != tuple(weight.shape):
                raise SpecError(
                    f"UserCriterion.fn must return scores of the weight's shape {tuple(weight.shape)}, got "
                    f"{tuple(getattr(scores, 'shape', ()))}."
                )
            return scores
    if gradient is None:
        name = type(criterion).__name__
        raise SpecError(f"The criterion {name} needs gradients: pass train= data to prune(), or call it after backward().")
    match criterion:
        case Taylor():
            return taylor(weight, gradient, xp=xp)
        case Fisher():
            return fisher(weight, gradient)
    raise SpecError(f"The criterion {criterion!r} scores no single weights. Take Magnitude, Random, Taylor or Fisher.")


def geometric_median(filters: Floats) -> Floats:
    """`Σ_j ‖w_i - w_j‖₂` for each filter: the least is nearest to the geometric median (He et al. 2019, eq. 5).

    Shapes: filters (m, size of one); result (m,).
    """
    squares = np.einsum("ij,ij->i", filters, filters)
    distances = squares[:, None] + squares[None, :] - 2 * filters @ filters.T
    sums: Floats = np.sqrt(np.maximum(distances, 0)).sum(1)
    return sums


def group_norm(parts: Sequence[Floats], p: int) -> Floats:
    """`(Σ |w|^p)^(1/p)` over all that a group holds. `parts`: for each tensor, Σ |w|^p for each group, (groups,)."""
    total: Floats = np.sum(parts, axis=0) ** (1 / p)
    return total


def normalised(scores: Floats) -> Floats:
    """Scores divided by their mean, so that layers of different scale can be ranked together; zeros stay zeros."""
    mean = float(np.mean(scores)) if scores.size else 0.0
    return scores / mean if mean > 0 else scores
