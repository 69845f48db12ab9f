"""Distillation losses on the relations between the examples of a batch: pure functions of two arrays (n, …).

The widths of student and teacher may differ: only distances, angles and similarities are compared. Every result is a scalar.
No gradient flows to the teacher.
"""

from __future__ import annotations

from whet.numerics.losses import bregman
from whet.numerics.namespace import Array, Namespace

_TINY = 1e-16  # added to squared norms: a vector of zeros stays zero, and its gradient is finite
_LEAST = 1e-7  # added to similarities, which PKT takes the logarithm of


def rkd_distance(student: Array, teacher: Array, *, xp: Namespace) -> Array:
    """`mean over i, j of huber(ψ(sᵢ, sⱼ) - ψ(tᵢ, tⱼ))`, `ψ` the distance over the mean distance (Park et al. 2019, eq. 5-7).

    arXiv:1904.05068. The mean is over all n² ordered pairs, as in the authors' code. Memory: n² · width.
    """
    return xp.mean(_huber(_distances(student, xp) - _distances(xp.stop_gradient(teacher), xp), xp))


def rkd_angle(student: Array, teacher: Array, *, xp: Namespace) -> Array:
    """`mean over i, j, k of huber(cos∠sᵢsⱼsₖ - cos∠tᵢtⱼtₖ)` (Park et al. 2019, arXiv:1904.05068, eq. 8-9).

    The mean is over all n³ ordered triples, as in the authors' code. Memory: n² · width and n³.
    """
    return xp.mean(_huber(_angles(student, xp) - _angles(xp.stop_gradient(teacher), xp), xp))


def similarity_preserving(student: Array, teacher: Array, *, xp: Namespace) -> Array:
    """`‖G_s - G_t‖² / n²`, the rows of `G = Q Qᵀ` divided by their norms (Tung & Mori 2019, arXiv:1907.09682, eq. 1-4)."""
    grams = []
    for features in (student, xp.stop_gradient(teacher)):
        rows = _rows(features, xp)
        grams.append(_unit(xp.matmul(rows, xp.transpose(rows)), xp))
    difference = grams[0] - grams[1]
    return xp.mean(difference * difference)


def pkt(student: Array, teacher: Array, *, xp: Namespace) -> Array:
    """`mean over i of Σ_{j≠i} p(j|i) log(p(j|i) / q(j|i))`, `p` the teacher's (Passalis & Tefas 2018, eq. 5-7).

    arXiv:1803.10837. The conditional probabilities are the similarities `(cos + 1) / 2` to the other examples, divided by
    their sum. 10⁻⁷ is added to each. A batch of one has no others, and costs nothing.
    """
    q, p = (_neighbours(features, xp) for features in (student, xp.stop_gradient(teacher)))
    return xp.mean(xp.sum(bregman(p, q, xp.log(p + _LEAST) - xp.log(q + _LEAST), xp=xp), axis=-1))


def crd(student: Array, teacher: Array, temperature: float, *, xp: Namespace) -> Array:
    """`mean over i of -log h(tᵢ, sᵢ) - Σ_{j≠i} log(1 - h(tⱼ, sᵢ))`, contrastive (Tian et al. 2020, eq. 17-19).

    arXiv:1910.10699. `h(t, s) = eᶻ / (eᶻ + N/M)` with `z = t·s / temperature`; the N = n - 1 other examples of the batch are
    the negatives, drawn from its M = n. Shapes: both (n, dimension), mapped to one space and not yet of unit length. The
    teacher's map learns too: what it maps must already have no history.
    """
    s, t = (_unit(_rows(z, xp), xp) for z in (student, teacher))
    z = xp.matmul(s, xp.transpose(t)) / temperature
    count = xp.sum(xp.full_like(z[:, :1], 1.0))
    beyond = z - xp.log(xp.maximum(count - 1.0, xp.full_like(count, 0.5)) / count)
    # log h = -softplus(-beyond) and log(1 - h) = -softplus(beyond)
    signed = xp.where(_itself(z, xp), -beyond, beyond)
    rest = xp.log(1.0 + xp.exp(-xp.abs(signed)))
    return xp.mean(xp.sum(xp.maximum(signed, xp.full_like(signed, 0.0)) + rest, axis=-1))


def _itself(square: Array, xp: Namespace) -> Array:
    """Where an example (n, n) meets itself: by position, not by value, for two examples may be the same."""
    place = xp.positions(square[:, 0])
    return place[:, None] == place[None, :]


def _rows(features: Array, xp: Namespace) -> Array:
    width = 1
    for length in features.shape[1:]:
        width *= length
    return xp.reshape(features, (-1, width))


def _unit(x: Array, xp: Namespace) -> Array:
    return x / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) + _TINY)


def _differences(features: Array, xp: Namespace) -> Array:
    """`xᵢ - xⱼ` at (j, i, width). Not by way of `x·x`, which loses the digits of near examples."""
    rows = _rows(features, xp)
    return rows[None, :, :] - rows[:, None, :]


def _distances(features: Array, xp: Namespace) -> Array:
    """All distances (n, n) over the mean of those that are not zero."""
    apart = _differences(features, xp)
    square = xp.sum(apart * apart, axis=-1)
    is_apart, none, one = square > 0, xp.full_like(square, 0.0), xp.full_like(square, 1.0)
    distance = xp.where(is_apart, xp.sqrt(xp.where(is_apart, square, one)), none)  # √0 has no finite gradient
    mean = xp.sum(distance) / xp.clip(xp.sum(xp.where(is_apart, one, none)), 1.0, 1e30)
    return distance / xp.where(mean > 0, mean, xp.full_like(mean, 1.0))


def _angles(features: Array, xp: Namespace) -> Array:
    """The cosines of all angles, (n, n, n): at (j, i, k) of the one at j between i and k; 0 where two are the same."""
    sides = _unit(_differences(features, xp), xp)
    return xp.matmul(sides, xp.transpose(sides))


def _huber(x: Array, xp: Namespace) -> Array:
    """`x²/2` up to 1, `|x| - 1/2` beyond."""
    size = xp.abs(x)
    return xp.where(size < 1, 0.5 * x * x, size - 0.5)


def _neighbours(features: Array, xp: Namespace) -> Array:
    """The probabilities (n, n) of an example's neighbours, its own 0."""
    unit = _unit(_rows(features, xp), xp)
    similar = (xp.matmul(unit, xp.transpose(unit)) + 1.0) / 2.0
    similar = xp.where(_itself(similar, xp), xp.full_like(similar, 0.0), similar + _LEAST)
    return similar / (xp.sum(similar, axis=-1, keepdims=True) + _TINY)
