"""Distillation losses on feature maps: pure functions of two arrays (n, positions…, channels), channels last.

Positions are none (dense features), a length, or height and width. Every result is a scalar. No gradient flows to the teacher.
"""

from __future__ import annotations

from whet.errors import ModelError
from whet.numerics.losses import mean_of_rows
from whet.numerics.namespace import Array, Namespace

_TINY = 1e-16  # added to squared norms: a map of zeros stays zero, and its gradient is finite


def hints(student: Array, teacher: Array, *, xp: Namespace, real: Array | None = None) -> Array:
    """`mean((r(s) - t)²)` over all elements (FitNets; Romero et al. 2015, arXiv:1412.6550, eq. 3, as a mean, without its ½).

    `student` has already been projected by `r`, where it has other channels. Shapes: equal; `real` (n, positions…) is False
    where a position is padding, which then does not count.
    """
    difference = student - xp.stop_gradient(teacher)
    return mean_of_rows(xp.mean(difference * difference, axis=-1), real, xp=xp)


def attention_transfer(student: Array, teacher: Array, *, xp: Namespace) -> Array:
    """`mean((Q_s/‖Q_s‖ - Q_t/‖Q_t‖)²)` with `Q = mean over channels of a²`, one number for each position.

    Zagoruyko & Komodakis 2017, arXiv:1612.03928, eq. 2, squared as in the authors' code. Mean over examples and positions.
    Shapes: equal positions, any channels.
    """
    difference = attention_map(student, xp=xp) - attention_map(xp.stop_gradient(teacher), xp=xp)
    return xp.mean(difference * difference)


def attention_map(features: Array, *, xp: Namespace) -> Array:
    """`Q/‖Q‖₂` of each example, (n, positions): where its features are strong."""
    strength = xp.reshape(xp.mean(features * features, axis=-1), (-1, _size(features.shape[1:-1])))
    return strength / xp.sqrt(xp.sum(strength * strength, axis=-1, keepdims=True) + _TINY)


def same_positions(student: Array, teacher: Array, *, xp: Namespace) -> tuple[Array, Array]:
    """Both at the coarser of their two resolutions: the mean is taken over each block of positions of the finer one.

    Raises:
        ModelError: they have another number of axes, or sizes that do not divide each other.
    """
    one, other = tuple(student.shape[1:-1]), tuple(teacher.shape[1:-1])
    if len(one) != len(other):
        raise ModelError(
            f"Features of shape {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher have no common "
            "positions. Choose layers whose outputs have as many axes."
        )
    common = tuple(min(pair) for pair in zip(one, other, strict=True))
    if any(a % size or b % size for a, b, size in zip(one, other, common, strict=True)):
        raise ModelError(
            f"Features with positions {one} of the student and {other} of the teacher: one is no multiple of the other. "
            "Choose layers of resolutions that divide each other."
        )
    return _pooled(student, common, xp), _pooled(teacher, common, xp)


def _pooled(features: Array, positions: tuple[int, ...], xp: Namespace) -> Array:
    if tuple(features.shape[1:-1]) == positions:
        return features
    blocks: list[int] = []
    for size, wanted in zip(features.shape[1:-1], positions, strict=True):
        blocks += [wanted, size // wanted]
    inner = tuple(range(2, 2 * len(positions) + 1, 2))
    return xp.mean(xp.reshape(features, (-1, *blocks, features.shape[-1])), axis=inner)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
