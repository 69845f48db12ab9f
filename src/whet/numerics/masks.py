"""Masks: 1 where kept, 0 where removed. Counts are exact and ties are broken by position, lowest index removed first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from whet.errors import SpecError
from whet.numerics.allocation import erk_densities, rounded_counts
from whet.numerics.namespace import Array, Namespace
from whet.specs.pruning import ERK, MASKED, NM, Block, Global, Isomorphic, Prune, Uniform

Allocation = Uniform | Global | ERK | Isomorphic


def removed_count(sparsity: float, size: int) -> int:
    """How many of `size` weights a sparsity removes: rounded half to even, never all of them."""
    return min(round(sparsity * size), max(size - 1, 0))


def most_removed(
    sizes: Sequence[int], gone: Sequence[int], sparsity: float, allocation: Allocation, granularity: Any = None
) -> int:
    """How many more weights (or blocks) `sparsity` removes, in the array where that is most (Uniform) or in the whole.

    `gone` counts those removed before, array by array; 0 says that nothing would change.
    """
    if isinstance(granularity, Block):
        unit = granularity.rows * granularity.columns
        sizes, gone = [size // unit for size in sizes], [old // unit for old in gone]
    if not isinstance(allocation, Uniform):
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


def masks_for(scores: list[Array], sparsity: float, allocation: Allocation, *, xp: Namespace) -> list[Array]:
    """One mask for each array of scores, together removing `sparsity` of all.

    `Uniform` removes the fraction from every array; `Global` ranks all scores together, but leaves at least one weight
    in every array so that no layer dies; `ERK` removes more from arrays with more weights, see `erk_densities`.
    """
    sizes = [math.prod(int(n) for n in score.shape) for score in scores]
    if isinstance(allocation, Uniform):
        return [mask_lowest(s, removed_count(sparsity, n), xp=xp) for s, n in zip(scores, sizes, strict=True)]
    if isinstance(allocation, ERK):
        densities = erk_densities([[int(n) for n in s.shape if n > 1] or [1] for s in scores], 1 - sparsity)
        counts = rounded_counts(sizes, [1 - density for density in densities], removed_count(sparsity, sum(sizes)))
        return [mask_lowest(s, count, xp=xp) for s, count in zip(scores, counts, strict=True)]
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


def nm_mask(scores: Array, keep: int, m: int, axis: int, *, xp: Namespace) -> Array:
    """A float32 mask with the `keep` highest of every `m` neighbours along `axis`; of ties the first go.

    The size of `axis` must be a multiple of `m` (Mishra et al. 2021, arXiv:2104.08378, section 3.1).
    """
    shape = tuple(int(n) for n in scores.shape)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    rows = xp.reshape(scores, (before * shape[axis] // m, m, after))
    columns = [rows[:, j, :] for j in range(m)]
    kept = []
    for j, own in enumerate(columns):
        above = xp.cast(xp.full_like(own, 0.0), "float32")
        for k, other in enumerate(columns):
            if k != j:
                above = above + xp.cast(other >= own if k > j else other > own, "float32")
        kept.append(xp.reshape(xp.cast(above < keep, "float32"), (before * shape[axis] // m, 1, after)))
    return xp.reshape(xp.concatenate(kept, axis=1), shape)


def block_scores(scores: Array, rows: int, columns: int, out_axis: int, in_axis: int | None, *, xp: Namespace) -> Array:
    """The mean score of each block of `rows` × `columns` positions of the two axes, which they must divide."""
    split, axes = _block_shape(tuple(int(n) for n in scores.shape), rows, columns, out_axis, in_axis)
    return xp.mean(xp.reshape(scores, split), axis=axes, keepdims=True)


def block_mask(
    mask: Array, like: Array, rows: int, columns: int, out_axis: int, in_axis: int | None, *, xp: Namespace
) -> Array:
    """The mask of blocks, spread over the weights of `like`."""
    shape = tuple(int(n) for n in like.shape)
    split, axes = _block_shape(shape, rows, columns, out_axis, in_axis)
    reduced = tuple(1 if d in axes else n for d, n in enumerate(split))
    ones = xp.cast(xp.full_like(xp.reshape(like, split), 1.0), "float32")
    return xp.reshape(xp.reshape(mask, reduced) * ones, shape)


def _block_shape(
    shape: tuple[int, ...], rows: int, columns: int, out_axis: int, in_axis: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape with both axes cut into (blocks, positions of a block), and the axes of the latter."""
    split: list[int] = []
    axes: list[int] = []
    for d, n in enumerate(shape):
        step = rows if d == out_axis else columns if d == in_axis else 1
        split += [n // step, step]
        axes.append(len(split) - 1)
    return tuple(split), tuple(axes)


def unfit(shape: tuple[int, ...], axes: tuple[int, int | None], granularity: Any) -> str | None:
    """Why a weight of this shape takes no mask of this granularity; None if it does. axes: (out, in).

    Raises:
        SpecError: this granularity has no masks.
    """
    if not isinstance(granularity, MASKED):
        name = type(granularity).__name__
        raise SpecError(
            f"{name}() makes tensors smaller and has no masks: it is a step of its own, whet.prune(model, Prune(…, granularity="
            f"{name}())), before the training that repairs what it cost."
        )
    out_axis, in_axis = axes
    inputs = 1 if in_axis is None else shape[in_axis]
    if isinstance(granularity, NM) and inputs % granularity.m:
        return f"its {inputs} inputs are no multiple of {granularity.m}"
    if isinstance(granularity, Block) and (shape[out_axis] % granularity.rows or inputs % granularity.columns):
        return f"its {shape[out_axis]} × {inputs} channels are no multiple of {granularity.rows} × {granularity.columns}"
    return None


def patterned(
    scores: list[Array], axes: Sequence[tuple[int, int | None]], spec: Prune, sparsity: float, *, xp: Namespace
) -> list[Array]:
    """One mask for each array of scores, in the granularity and allocation of `spec`. axes: (out, in) of each array.

    An n:m pattern on the way up keeps more of every m, in proportion to `sparsity`.
    """
    pattern = spec.granularity
    if isinstance(pattern, NM):
        share = min(sparsity / spec.fraction, 1.0)
        keep = pattern.m - math.floor((pattern.m - pattern.n) * share + 1e-9)
        return [nm_mask(s, keep, pattern.m, 0 if a[1] is None else a[1], xp=xp) for s, a in zip(scores, axes, strict=True)]
    if isinstance(pattern, Block):
        size = pattern.rows, pattern.columns
        blocks = [block_scores(s, *size, *a, xp=xp) for s, a in zip(scores, axes, strict=True)]
        masks = masks_for(blocks, sparsity, spec.allocation, xp=xp)
        return [block_mask(m, s, *size, *a, xp=xp) for m, s, a in zip(masks, scores, axes, strict=True)]
    return masks_for(scores, sparsity, spec.allocation, xp=xp)
