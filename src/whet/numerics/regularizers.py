"""Penalties that training adds to its loss."""

from __future__ import annotations

import math

from whet.numerics.namespace import Array, Namespace

TINY = 1e-24  # below this the gradient of a norm is taken as zero, not as infinite


def group_lasso(weight: Array, axis: int, *, xp: Namespace) -> Array:
    """`Σ_g √|g| · ‖w_g‖₂` over the positions `g` of `axis`, a scalar.

    Yuan & Lin 2006; Wen et al. 2016, arXiv:1608.03665, eq. 1.
    """
    shape = tuple(int(n) for n in weight.shape)
    others = tuple(d for d in range(len(shape)) if d != axis % len(shape))
    squares = xp.sum(weight * weight, axis=others)
    norms = xp.sqrt(xp.maximum(squares, xp.full_like(squares, TINY)))
    return math.sqrt(math.prod(shape) / shape[axis]) * xp.sum(norms)
