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
    """A float32 mask of `scores`' shape that removes exactly the `count` lowest scores."""
    size = math.prod(int(n) for n in scores.shape)
    order = xp.argsort(xp.reshape(scores, (size,)))
    rank = xp.argsort(order)  # the inverse permutation: rank of every element
    return xp.reshape(xp.cast(rank >= count, "float32"), tuple(int(n) for n in scores.shape))


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
    rank = xp.argsort(xp.argsort(flat))
    return xp.where(rank == size - 1, xp.full_like(flat, math.inf), flat)
