"""The inputs of Keras' convolutions and dense layers as rows of a matrix product, at a sample of their output positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Layer = Any


@dataclass(frozen=True, slots=True)
class Geometry:
    """One convolution, channels last, or (rank 0) a dense layer; `padding` is "valid", "same" or "causal"."""

    rank: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: str = "valid"
    groups: int = 1
    transposed: bool = False


def geometry(layer: Layer, op: str) -> Geometry:
    """The geometry of a layer that computes the canonical operation `op`."""
    if op == "linear":
        return Geometry(0)
    shape = tuple(int(size) for size in layer.kernel.shape)
    rank = len(shape) - 2
    depthwise = hasattr(layer, "depth_multiplier")
    groups = shape[-2] if depthwise else int(getattr(layer, "groups", 1))
    sizes = (_each(layer.strides, rank), _each(layer.dilation_rate, rank))
    return Geometry(rank, shape[:rank], *sizes, str(layer.padding), groups, op == "conv_transpose")


def positions(geometry: Geometry, output: Floats, most: int, seed: int) -> npt.NDArray[np.intp]:
    """Where to look, at most `most` rows: indices of rows of a dense layer's output, or of positions in every example's.

    The same for the same seed and shape of `output`.
    """
    if geometry.rank == 0:
        count, wanted = math.prod(output.shape[:-1]), most
    else:
        count = math.prod(output.shape[1:-1])
        wanted = math.ceil(most / max(output.shape[0], 1))
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def outputs_at(geometry: Geometry, output: Floats, at: npt.NDArray[np.intp]) -> Floats:
    """(rows, channels) of an output at `positions`."""
    if geometry.rank == 0:
        return output.reshape(-1, output.shape[-1])[at]
    return output.reshape(output.shape[0], -1, output.shape[-1])[:, at].reshape(-1, output.shape[-1])


def columns_at(geometry: Geometry, x: Floats, out: tuple[int, ...], at: npt.NDArray[np.intp]) -> Floats:
    """(groups, rows, columns): what `outputs_at` are the products of, columns ordered (kernel…, in). out: output positions."""
    if geometry.rank == 0:
        return np.ascontiguousarray(x.reshape(-1, x.shape[-1])[at])[None]
    x, stride = _padded(geometry, x, out)
    steps = x.strides[1:-1]
    shape = (x.shape[0], *out, *geometry.kernel, x.shape[-1])
    strides = (
        x.strides[0],
        *(s * step for s, step in zip(steps, stride, strict=True)),
        *(s * step for s, step in zip(steps, geometry.dilation, strict=True)),
        x.strides[-1],
    )
    windows = np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False)
    where: tuple[Any, ...] = (slice(None), *np.unravel_index(at, out))
    found = windows[where]  # (examples, positions, kernel…, in)
    if geometry.transposed:
        found = np.flip(found, tuple(range(2, 2 + geometry.rank)))
    split = found.reshape(-1, *geometry.kernel, geometry.groups, x.shape[-1] // geometry.groups)
    front = np.moveaxis(split, -2, 0)  # (groups, rows, kernel…, in / groups)
    return np.ascontiguousarray(front).reshape(geometry.groups, front.shape[1], -1)


def _padded(geometry: Geometry, x: Floats, out: tuple[int, ...]) -> tuple[Floats, tuple[int, ...]]:
    """`x` with its padding, and the stride of the windows over it."""
    reach = [d * (k - 1) for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
    pairs = []
    if not geometry.transposed:
        for size, count, stride, more in zip(x.shape[1:-1], out, geometry.stride, reach, strict=True):
            total = max((count - 1) * stride + more + 1 - size, 0)
            before = {"valid": 0, "causal": more}.get(geometry.padding, total // 2)
            pairs.append((before, max(total - before, 0)))
        return np.pad(x, ((0, 0), *pairs, (0, 0))), geometry.stride
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[1:-1], geometry.stride, strict=True)]
    wide = np.zeros((x.shape[0], *sizes, x.shape[-1]), x.dtype)
    index: tuple[Any, ...] = (slice(None), *(slice(None, None, stride) for stride in geometry.stride), slice(None))
    wide[index] = x
    for size, count, stride, more in zip(sizes, out, geometry.stride, reach, strict=True):
        own = max((-(-count // stride) - 1) * stride + more + 1 - count, 0) // 2 if geometry.padding == "same" else 0
        before = max(more - own, 0)
        pairs.append((before, max(count + more - before - size, 0)))
    return np.pad(wide, ((0, 0), *pairs, (0, 0))), (1,) * geometry.rank


def _each(value: Any, rank: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(int(size) for size in (sizes * rank if len(sizes) == 1 else sizes))
