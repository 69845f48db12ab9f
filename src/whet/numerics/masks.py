"""Masks: 1 where kept, 0 where removed. Counts are exact and ties are broken by position, lowest index removed first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from whet.numerics.namespace import Array, Namespace
from whet.specs.pruning import Global, Uniform


def removed_count(sparsity: float, size: int) -> int:
    """How many of `size` weights a sparsity removes: rounded half to even, never all of them."""
    return min(round(sparsity * size), max(size - 1, 0))


def most_removed(sizes: Sequence[int], gone: Sequence[int], sparsity: float, allocation: Uniform | Global) -> int:
    """How many more weights `sparsity` removes, in the array where that is most (Uniform) or in the whole (Global).

    `gone` counts those removed before, array by array; 0 says that nothing would change.
    """
    if isinstance(allocation, Global):
        sizes, gone = [sum(sizes)], [sum(gone)]
    return max(0, *(removed_count(sparsity, size) - old for size, old in zip(sizes, gone, strict=True)))


def mask_lowest(scores: Array, count: int, *, xp: Namespace) -> Array:
    """A float32 mask of `scores`' shape that removes exactly the `count` lowest scores.

    One stable sort: the last score to go has the greatest position among those of its value that go.
    """
    shape = tuple(int(n) for n in scores.shape)
    flat = xp.reshape(scores, (math.prod(shape),))
    if count <= 0:
        return xp.reshape(xp.cast(xp.full_like(flat, 1.0), "float32"), shape)
    last = xp.argsort(flat)[count - 1]
    highest = flat[last]
    kept = (flat > highest) | ((flat == highest) & (xp.positions(flat) > last))
    return xp.reshape(xp.cast(kept, "float32"), shape)


def masks_for(scores: list[Array], sparsity: float, allocation: Uniform | Global, *, xp: Namespace) -> list[Array]:
    """One mask for each array of scores, together removing `sparsity` of all.

    `Uniform` removes the fraction from every array; `Global` ranks all scores together, but leaves at least one weight
    in every array so that no layer dies.
    """
    sizes = [math.prod(int(n) for n in score.shape) for score in scores]
    if isinstance(allocation, Uniform):
        return [mask_lowest(s, removed_count(sparsity, n), xp=xp) for s, n in zip(scores, sizes, strict=True)]
    flat = xp.concatenate([_spare_highest(s, n, xp=xp) for s, n in zip(scores, sizes, strict=True)])
    count = min(removed_count(sparsity, sum(sizes)), sum(max(n - 1, 0) for n in sizes))
    together = mask_lowest(flat, count, xp=xp)
    masks, start = [], 0
    for score, size in zip(scores, sizes, strict=True):
        masks.append(xp.reshape(together[start : start + size], tuple(int(n) for n in score.shape)))
        start += size
    return masks


def _spare_highest(scores: Array, size: int, *, xp: Namespace) -> Array:
    """The flat scores, the highest of them raised to infinity."""
    flat = xp.reshape(scores, (size,))
    if size == 0:
        return flat
    return xp.where(xp.positions(flat) == xp.argsort(flat)[size - 1], xp.full_like(flat, math.inf), flat)
