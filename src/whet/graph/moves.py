"""Operations that only move ids about: reshape, concatenate, split, slice, pad, permute, repeat, pixel shuffle.

Where a size is written into the operation, a `Site` records it: `name` is the operation, and what does not change needs none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from whet.graph.ids import IntArray, Value
from whet.graph.structure import Site, Structure


def concat(s: Structure, values: Sequence[Value], dim: int) -> Value:
    """Join along `dim`; the other dimensions unite."""
    for value in values[1:]:
        for d, axis in enumerate(value):
            if d != dim:
                s.ids.unite(values[0][d], axis)
    joined = np.concatenate([value[dim] for value in values])
    return (*values[0][:dim], joined, *values[0][dim + 1 :])


def stack(s: Structure, values: Sequence[Value], dim: int) -> Value:
    """Join along a new dimension, which stays."""
    x = s.elementwise(*values)
    return (*x[:dim], s.ids.fresh(len(values), "a stacked axis"), *x[dim:])


def chunk(s: Structure, x: Value, parts: int, dim: int, name: str) -> list[Value]:
    """Equal parts: they lose the same positions, so that equal parts remain. What does not divide stays."""
    axis = x[dim]
    if len(axis) % parts:
        s.ids.fix(axis, f"{name} cuts it into unequal parts")
        size = math.ceil(len(axis) / parts)
        return split(s, x, [len(axis[i : i + size]) for i in range(0, len(axis), size)], dim, name)
    for piece in np.split(axis, parts)[1:]:
        s.ids.unite(axis[: len(piece)], piece)
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in np.split(axis, parts)]


def split(s: Structure, x: Value, sizes: Sequence[int], dim: int, name: str) -> list[Value]:
    """Parts of the given sizes."""
    pieces = np.split(x[dim], np.cumsum(sizes)[:-1])
    s.sites.append(Site(name, tuple(pieces)))
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


def cut(s: Structure, x: Value, dim: int, start: int, stop: int, step: int, name: str) -> Value:
    """`x[start:stop:step]` along `dim`."""
    axis = x[dim]
    if step != 1:
        s.ids.fix(axis, f"{name} takes every {step}th position")
    if (start, stop) != (0, len(axis)):
        s.sites.append(Site(name, (axis[:start], axis[:stop])))
    return (*x[:dim], axis[start:stop:step], *x[dim + 1 :])


def select(s: Structure, x: Value, dim: int, name: str) -> Value:
    """One position of `dim`, chosen by number: the dimension stays."""
    s.ids.fix(x[dim], f"{name} picks a position by number")
    return (*x[:dim], *x[dim + 1 :])


def pad(s: Structure, x: Value, amounts: Sequence[tuple[int, int]], name: str, *, constant: bool = True) -> Value:
    """`amounts[d]` = (before, after) new positions of constants; other modes mirror positions, which stay."""
    out: list[IntArray] = []
    pieces: list[IntArray] = []
    for axis, (before, after) in zip(x, amounts, strict=True):
        if not constant and (before or after):
            s.ids.fix(axis, f"{name} mirrors it")
        low, high = (s.ids.fresh(max(n, 0), None if constant else f"{name} mirrors it") for n in (before, after))
        if s.balanced and constant and before == after > 0:
            s.ids.unite(low, high)
        if before < 0 or after < 0:
            s.ids.fix(axis, f"{name} crops it")
        kept = axis[max(-before, 0) : len(axis) - max(-after, 0)]
        out.append(np.concatenate([low, kept, high]))
        pieces += [low, high]
    s.sites.append(Site(name, tuple(pieces)))
    return tuple(out)


def expand(s: Structure, x: Value, shape: Sequence[int], name: str) -> Value:
    """Dimensions of size 1 (or new ones) repeated; these stay."""
    padded = (None,) * (len(shape) - len(x)) + x
    out = tuple(
        axis if axis is not None and len(axis) == n else s.ids.fresh(n, f"{name} repeats it")
        for axis, n in zip(padded, shape, strict=True)
    )
    s.sites.append(Site(name, out))
    return out


def repeat(x: Value, times: Sequence[int]) -> Value:
    """Tiled: the whole dimension `times` over."""
    return tuple(np.tile(axis, n) for axis, n in zip(x, times, strict=True))


def repeat_each(x: Value, times: int, dim: int) -> Value:
    """Every position `times` over, next to each other."""
    return (*x[:dim], np.repeat(x[dim], times), *x[dim + 1 :])


def permute(x: Value, dims: Sequence[int]) -> Value:
    """Dimensions in another order."""
    return tuple(x[d] for d in dims)


def reshape(s: Structure, x: Value, shape: Sequence[int], name: str, free: Sequence[int] = ()) -> Value:
    """Row-major reshape. Dimensions are cut into their common factors, and these joined.

    free: the dimensions of the result whose size is worked out by the operation itself (-1).
    """
    # 1. the dimensions of x as factors, 2. the factors as dimensions of the result
    bounds = _bounds([len(axis) for axis in x]), _bounds(shape)
    common = sorted({*bounds[0], *bounds[1]})
    if any(high % low for low, high in itertools.pairwise(common)):
        out = _reshape_in_runs(s, x, shape, name)
    else:
        out = _joined(s, _factors(s, x, common, bounds[0]), shape, common, bounds[1])
    pieces = tuple(s.ids.fresh(0) if d in free else axis for d, axis in enumerate(out))
    s.sites.append(Site(name, pieces, tuple(out[d] for d in free)))
    return out


def _bounds(sizes: Sequence[int]) -> list[int]:
    """The running product after each dimension, from the front."""
    return list(itertools.accumulate(sizes, lambda a, b: a * b, initial=1))


def _factors(s: Structure, x: Value, common: list[int], own: list[int]) -> list[IntArray]:
    """One array of ids for every step of `common`."""
    factors: list[IntArray] = []
    for axis, low, high in zip(x, own[:-1], own[1:], strict=True):
        inside = [bound for bound in common if low <= bound <= high]
        sizes = [b // a for a, b in itertools.pairwise(inside)]
        if len(sizes) == 1:
            factors.append(axis)
        elif sizes:
            parts = [s.ids.fresh(n) for n in sizes]
            s.ids.link(axis, parts)
            factors += parts
    return factors


def _joined(s: Structure, factors: list[IntArray], shape: Sequence[int], common: list[int], own: list[int]) -> Value:
    out: list[IntArray] = []
    steps = list(itertools.pairwise(common))
    for n, low, high in zip(shape, own[:-1], own[1:], strict=True):
        mine = [factor for factor, (a, b) in zip(factors, steps, strict=True) if low <= a and b <= high]
        if n == 1:
            out.append(s.ids.fresh(1, "a dimension of size 1"))
        elif len(mine) == 1:
            out.append(mine[0])
        else:
            out.append(s.ids.fresh(n))
            s.ids.link(out[-1], mine)
    return tuple(out)


def _reshape_in_runs(s: Structure, x: Value, shape: Sequence[int], name: str) -> Value:
    """A reshape without common factors somewhere: what lies in such a run of dimensions stays, the rest is followed."""
    left, right = _bounds([len(axis) for axis in x]), _bounds(shape)
    shared = sorted(set(left) & set(right))
    out: list[IntArray] = []
    for low, high in itertools.pairwise(shared):
        axes = tuple(a for a, b, c in zip(x, left[:-1], left[1:], strict=True) if low <= b and c <= high and len(a) > 1)
        sizes = [n for n, b, c in zip(shape, right[:-1], right[1:], strict=True) if low <= b and c <= high and n > 1]
        bounds = sorted({*_bounds([len(a) for a in axes]), *_bounds(sizes)})
        if any(b % a for a, b in itertools.pairwise(bounds)):
            s.fix(axes, f"{name} cuts across it")
            out += s.fresh(sizes, f"{name} cuts across it")
        else:
            own = _bounds([len(a) for a in axes])
            out += _joined(s, _factors(s, axes, bounds, own), sizes, bounds, _bounds(sizes))
    wide = iter(out)
    return tuple(next(wide) if n > 1 else s.ids.fresh(n, "a dimension of size 1") for n in shape)


def channel_shuffle(s: Structure, x: Value, groups: int, name: str) -> Value:
    """Channels (group, index in the group) in the order (index, group)."""
    group, inside = s.ids.fresh(groups), s.ids.fresh(len(x[1]) // groups)
    out = s.ids.fresh(len(x[1]))
    s.ids.link(x[1], (group, inside))
    s.ids.link(out, (inside, group))
    s.sites.append(Site(name, (group,)))
    return (x[0], out, *x[2:])


def pixel_shuffle(s: Structure, x: Value, factor: int) -> Value:
    """(…, C·r², H, W) → (…, C, H·r, W·r)."""
    channels = s.ids.fresh(len(x[-3]) // factor**2)
    inside = s.ids.fresh(factor**2, "the positions of a pixel shuffle")
    s.ids.link(x[-3], (channels, inside))
    spatial = s.fresh((len(x[-2]) * factor, len(x[-1]) * factor), "a spatial or time axis")
    s.fix(x, "a spatial or time axis", [len(x) - 2, len(x) - 1])
    return (*x[:-3], channels, *spatial)


def pixel_unshuffle(s: Structure, x: Value, factor: int) -> Value:
    """(…, C, H·r, W·r) → (…, C·r², H, W)."""
    out = s.ids.fresh(len(x[-3]) * factor**2)
    s.ids.link(out, (x[-3], s.ids.fresh(factor**2, "the positions of a pixel shuffle")))
    s.fix(x, "a spatial or time axis", [len(x) - 2, len(x) - 1])
    return (*x[:-3], out, *s.fresh((len(x[-2]) // factor, len(x[-1]) // factor), "a spatial or time axis"))
