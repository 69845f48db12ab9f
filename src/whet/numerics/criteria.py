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
from whet.specs.criteria import (
    FROM_INPUTS,
    OBS,
    SNIP,
    Activation,
    Fisher,
    Magnitude,
    Movement,
    Taylor,
    UserCriterion,
    Wanda,
)

Floats = npt.NDArray[np.float64]


def magnitude(weight: Array, *, xp: Namespace) -> Array:
    """`|w|` (Han et al. 2015, arXiv:1506.02626). Same shape as `weight`."""
    return xp.abs(weight)


def taylor(weight: Array, gradient: Array, *, xp: Namespace) -> Array:
    """`|w · g|`: first-order change of the loss when `w` is removed (Molchanov et al. 2019, arXiv:1906.10771, eq. 8)."""
    return xp.abs(weight * gradient)


def movement(weight: Array, step: Array) -> Array:
    """`w · Δw` of one training step: positive where it moves `w` away from zero (Sanh et al. 2020, arXiv:2005.07683, eq. 4).

    With plain SGD `Δw = -η g`. The score of a weight is the sum over steps.
    """
    return weight * step


def fisher(weight: Array, squared_gradient: Array) -> Array:
    """`½ w² E[g²]`: second-order change of the loss with the diagonal Fisher matrix for the Hessian.

    LeCun et al. 1989 (Optimal Brain Damage), eq. 5; E[g²] as in Theis et al. 2018, arXiv:1801.05787, eq. 7.
    """
    return 0.5 * weight * weight * squared_gradient


def wanda(weight: Array, input_norm: Array, *, xp: Namespace) -> Array:
    """`|w| · ‖x‖₂` (Sun et al. 2024, arXiv:2306.11695, eq. 1), in the paper to be compared within a row.

    input_norm: for each weight the norm of the input that it multiplies, over examples and positions.
    """
    return xp.abs(weight) * input_norm


def obs(weight: Array, inverse_diagonal: Array) -> Array:
    """`w² / [H⁻¹]_cc`: the loss of removing `w` when the others make up for it (Hassibi & Stork 1993; arXiv:2301.00774, eq. 3).

    inverse_diagonal: for each weight `[H⁻¹]_cc` of the input that it multiplies, `H = 2 E[x xᵀ]`.
    """
    return weight * weight / inverse_diagonal


def random_scores(seed: int, index: int, shape: Sequence[int]) -> Floats:
    """Scores without meaning, for the weight number `index`: the same on every array library."""
    return np.random.default_rng((seed, index)).random(tuple(shape))


def weight_importance(criterion: Any, weight: Array, statistic: Array | None, *, xp: Namespace) -> Array:
    """The score of every weight under `criterion`; for `Random` see `random_scores`.

    statistic: an array of the weight's shape, None without data. Of gradients: ∂L/∂w, for Fisher E[(∂L/∂w)²], for Movement
    the sum over steps of `w · Δw`. Of the input that each weight multiplies: `√E[x²]`, for OBS `[H⁻¹]_cc`.

    Raises:
        SpecError: the criterion needs a statistic and there is none, or a user's function returns another shape.
    """
    match criterion:
        case Magnitude():
            return magnitude(weight, xp=xp)
        case UserCriterion():
            scores = criterion.fn(weight, statistic)
            if tuple(getattr(scores, "shape", ())) != tuple(weight.shape):
                raise SpecError(
                    f"UserCriterion.fn must return scores of the weight's shape {tuple(weight.shape)}, got "
                    f"{tuple(getattr(scores, 'shape', ()))}."
                )
            return scores
    if statistic is None:
        name = type(criterion).__name__
        if isinstance(criterion, FROM_INPUTS):
            raise SpecError(
                f"The criterion {name} looks at the inputs of convolutions and linear layers: pass batches as train=, and name "
                "other layers in keep=."
            )
        raise SpecError(
            f"The criterion {name} needs data for its gradients: pass train= batches of (inputs, targets), to a Pruner data=. "
            "(In your own PyTorch loop those that backward() has left will do.)"
        )
    match criterion:
        case Taylor() | SNIP():  # SNIP's division by the sum over all weights changes no rank
            return taylor(weight, statistic, xp=xp)
        case Fisher():
            return fisher(weight, statistic)
        case Movement() | Activation():
            return statistic
        case Wanda():
            return wanda(weight, statistic, xp=xp)
        case OBS():
            return obs(weight, statistic)
    raise SpecError(f"The criterion {criterion!r} scores no single weights. Take Magnitude, Taylor, Wanda or OBS.")


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
