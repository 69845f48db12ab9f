"""Regrowth: a mask that moves while its sparsity stays (Evci et al. 2020, RigL, arXiv:1911.11134)."""

from __future__ import annotations

import math

from whet.numerics.masks import mask_lowest
from whet.numerics.namespace import Array, Namespace


def rigl(weight: Array, gradient: Array, mask: Array, fraction: float, *, xp: Namespace) -> Array:
    """The mask after one update: of the kept weights `fraction` with the least `|w|` are dropped, and as many grow.

    Those grow that are not kept and have the largest `|∂L/∂w|`; what was dropped just now may not grow back before all others
    have. Ties go by position, the first of equal weights dropped first and grown last. Shapes are equal; masks are true where
    kept. How many are kept stays.
    """
    shape, mask = tuple(int(n) for n in mask.shape), xp.cast(mask, "bool")
    size, kept = math.prod(shape), int(xp.count_nonzero(mask))
    count = min(round(fraction * kept), size - kept)
    if count == 0:
        return mask
    infinite = xp.full_like(weight, math.inf)
    # Gone weights rank below all that are kept, so that removing size - kept + count leaves the largest kept ones.
    after_drop = mask_lowest(xp.where(mask, xp.abs(weight), -infinite), size - kept + count, xp=xp)
    dropped = mask & ~after_drop
    growth = xp.where(after_drop, infinite, xp.where(dropped, xp.full_like(weight, -1.0), xp.abs(gradient)))
    return mask_lowest(growth, size - kept, xp=xp)
