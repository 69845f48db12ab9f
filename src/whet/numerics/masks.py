"""Masks: true where kept, false where removed. Counts are exact and ties are broken by position, lowest index removed first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from whet.errors import SpecError
from whet.numerics.allocation import erk_densities, rounded_counts
from whet.numerics.namespace import Array, Namespace, numpy_namespace
from whet.specs import ERK, NM, Block, Global, Prune, Uniform, Wanda, Weight
from whet.specs.pruning import Allocation


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
    """True where kept, of `scores`' shape: all but exactly the `count` lowest scores, of equal ones the first.

    By selection of the highest score to go, not by sorting.
    """
    return _lowest([scores], count, xp=xp)[0]


def masks_for(scores: list[Array], sparsity: float, allocation: Allocation, *, xp: Namespace) -> list[Array]:
    """One mask for each array of scores, True where kept, together removing `sparsity` of all.

    `Uniform` removes the fraction from every array; `Global` ranks all scores together, but leaves at least one weight
    in every array so that no layer dies; `ERK` removes more from arrays with more weights, see `erk_densities`.
    """
    shapes = [tuple(int(n) for n in score.shape) for score in scores]
    if not isinstance(allocation, Global):
        counts = removed_counts(shapes, sparsity, allocation)
        return [mask_lowest(s, count, xp=xp) for s, count in zip(scores, counts, strict=True)]
    sizes = [math.prod(shape) for shape in shapes]
    count = min(removed_count(sparsity, sum(sizes)), sum(max(n - 1, 0) for n in sizes))
    return _lowest(scores, count, xp=xp, spare=True)


def _lowest(scores: list[Array], count: int, *, xp: Namespace, spare: bool = False) -> list[Array]:
    """Masks without the `count` lowest scores of all arrays, ranked together; ties go by array, then by position.

    spare: the highest score of every array stays, the last where several are equal.
    """
    hosted = [xp.on_host(score) for score in scores]
    if all(array is not None for array in hosted) and hosted:
        return [xp.from_host(mask) for mask in _lowest(hosted, count, xp=numpy_namespace, spare=spare)]
    flat = [xp.reshape(score, (math.prod(score.shape),)) for score in scores]
    if count <= 0:
        kept = [score == score for score in flat]
    else:
        highest = xp.kth_smallest(flat, count - 1)
        if spare and any(len(score) and not bool(xp.max(score) > highest) for score in flat):
            flat = [_spare_highest(score, xp=xp) for score in flat]
            highest = xp.kth_smallest(flat, count - 1)
        kept = _above(flat, count, highest, xp=xp)
    return [xp.reshape(mask, tuple(int(n) for n in score.shape)) for mask, score in zip(kept, scores, strict=True)]


def _above(flat: list[Array], count: int, highest: Array, *, xp: Namespace) -> list[Array]:
    """Where the scores lie above `highest`, or equal it and are among the last that do, so that `count` are left out."""
    kept = [score > highest for score in flat]
    spared = sum(map(len, flat)) - count - sum(int(xp.count_nonzero(mask)) for mask in kept)
    for score, mask in zip(reversed(flat), reversed(kept), strict=True):
        if spared == 0:
            break
        ties = score == highest
        found = int(xp.count_nonzero(ties))
        if found:
            first = int(xp.nth_true(ties, max(found - spared, 0)))
            mask[first:] |= ties[first:]
            spared -= min(found, spared)
    return kept


def removed_counts(shapes: Sequence[Sequence[int]], sparsity: float, allocation: Allocation) -> list[int]:
    """How many weights leave arrays of these shapes where no two arrays are compared: `Uniform` or `ERK`."""
    sizes = [math.prod(shape) for shape in shapes]
    if isinstance(allocation, ERK):
        densities = erk_densities([[n for n in shape if n > 1] or [1] for shape in shapes], 1 - sparsity)
        return rounded_counts(sizes, [1 - density for density in densities], removed_count(sparsity, sum(sizes)))
    return [removed_count(sparsity, size) for size in sizes]


def ranked_in_rows(scores: Array, out_axis: int, *, xp: Namespace) -> Array:
    """The rank of each score among those of its output, from 0, ties by position; `-inf` stays.

    So every output loses as many weights as any other, to one. Shapes are equal; float32.
    """
    shape = tuple(int(n) for n in scores.shape)
    size, outputs, after = math.prod(shape), shape[out_axis], math.prod(shape[out_axis:][1:])
    flat = xp.reshape(scores, (size,))
    rows = xp.positions(flat) // after % outputs
    by_score = xp.argsort(flat)
    order = xp.take(by_score, xp.argsort(xp.take(rows, by_score)))  # row by row, each by score
    ranks = xp.cast(xp.argsort(order) % (size // outputs), "float32")
    return xp.reshape(xp.where(flat == -math.inf, xp.full_like(ranks, -math.inf), ranks), shape)


def _spare_highest(flat: Array, *, xp: Namespace) -> Array:
    """The flat scores, the highest of them, the last where several are, raised to infinity."""
    if len(flat) == 0:
        return flat
    highest = flat == xp.max(flat)
    last = int(xp.nth_true(highest, int(xp.count_nonzero(highest)) - 1))
    return xp.concatenate([flat[:last], xp.full_like(flat[last : last + 1], math.inf), flat[last + 1 :]])


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
    return xp.reshape(xp.reshape(xp.cast(mask, "float32"), reduced) * ones, shape)


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
    if not isinstance(granularity, Weight | NM | Block):
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
    """One mask for each array of scores, True where kept, in the granularity and allocation of `spec`.

    axes: (out, in) of each array.

    An n:m pattern on the way up keeps more of every m, in proportion to `sparsity`.
    """
    pattern = spec.granularity
    if isinstance(spec.criterion, Wanda) and isinstance(pattern, Weight) and not isinstance(spec.allocation, Global):
        scores = [ranked_in_rows(s, a[0], xp=xp) for s, a in zip(scores, axes, strict=True)]
    if isinstance(pattern, NM):
        share = min(sparsity / spec.fraction, 1.0)
        keep = pattern.m - math.floor((pattern.m - pattern.n) * share + 1e-9)
        masks = [nm_mask(s, keep, pattern.m, 0 if a[1] is None else a[1], xp=xp) for s, a in zip(scores, axes, strict=True)]
        return [mask > 0 for mask in masks]
    if isinstance(pattern, Block):
        size = pattern.rows, pattern.columns
        blocks = [block_scores(s, *size, *a, xp=xp) for s, a in zip(scores, axes, strict=True)]
        masks = masks_for(blocks, sparsity, spec.allocation, xp=xp)
        return [block_mask(m, s, *size, *a, xp=xp) > 0 for m, s, a in zip(masks, scores, axes, strict=True)]
    return masks_for(scores, sparsity, spec.allocation, xp=xp)
