"""The inputs of convolutions and linear layers as rows of a matrix product, at a sample of their output positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from whet.torch.interception import Call

Tensor = Any
_AFTER_BIAS = {"conv": ("stride", "padding", "dilation", "groups")}
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True, slots=True)
class Geometry:
    """One call of a convolution, or (rank 0) of a linear layer; spatial axes only. padding: (before, after)."""

    rank: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


def geometry(call: Call, op: str, weight: Tensor) -> Geometry:
    """The geometry of a call of the canonical operation `op` with `weight`."""
    if op == "linear":
        return Geometry(0)
    transposed = op == "conv_transpose"
    names = _TRANSPOSED if transposed else _AFTER_BIAS["conv"]
    rank = weight.ndim - 2
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    given = {name: call.argument(3 + index, name, defaults[name]) for index, name in enumerate(names)}
    kernel = tuple(int(size) for size in weight.shape[2:])
    dilation, stride = _each(given["dilation"], rank), _each(given["stride"], rank)
    if isinstance(given["padding"], str):
        total = [d * (k - 1) if given["padding"] == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = tuple((p, p) for p in _each(given["padding"], rank))
    extra = _each(given.get("output_padding", 0), rank)
    return Geometry(rank, kernel, stride, padding, dilation, int(given["groups"]), transposed, extra)


def positions(geometry: Geometry, output: Tensor, most: int, seed: int) -> Tensor:
    """Where to look, at most `most` rows: indices of rows of a linear layer's output, or of positions in every example's.

    The same for the same seed and shape of `output`.
    """
    generator = torch.Generator().manual_seed(seed)
    if geometry.rank == 0:
        count, wanted = math.prod(output.shape[:-1]), most
    else:
        count = math.prod(output.shape[-geometry.rank :])
        wanted = math.ceil(most / max(_examples(geometry, output), 1))
    if wanted >= count:
        return torch.arange(count, device=output.device)
    return torch.randperm(count, generator=generator)[:wanted].sort().values.to(output.device)


def outputs_at(geometry: Geometry, output: Tensor, at: Tensor) -> Tensor:
    """(rows, channels) of an output at `positions`; a copy in float32."""
    if geometry.rank == 0:
        return output.reshape(-1, output.shape[-1])[at].float()
    batched = _batched(geometry, output)
    return batched.flatten(2)[:, :, at].transpose(1, 2).flatten(0, 1).float()


def columns_at(geometry: Geometry, x: Tensor, at: Tensor) -> Tensor:
    """(groups, rows, columns): what `outputs_at` are the products of, columns ordered (in, kernel…); a copy in float32."""
    if geometry.rank == 0:
        return x.reshape(-1, x.shape[-1])[at].float()[None]
    x = _batched(geometry, x)
    stride, padding = geometry.stride, geometry.padding
    if geometry.transposed:
        x, padding = _spread(x, geometry)
        stride = (1,) * geometry.rank
    x = F.pad(x, [size for pair in reversed(padding) for size in pair]).contiguous()
    windows = zip(x.shape[2:], geometry.kernel, stride, geometry.dilation, strict=True)
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in windows]
    own, spatial = x.stride()[:2], x.stride()[2:]
    view = x.as_strided(
        (*x.shape[:2], *out, *geometry.kernel),
        (
            *own,
            *(s * step for s, step in zip(spatial, stride, strict=True)),
            *(s * step for s, step in zip(spatial, geometry.dilation, strict=True)),
        ),
    )
    found = view[(slice(None), slice(None), *torch.unravel_index(at, out))]  # (examples, in, positions, kernel…)
    if geometry.transposed:
        found = found.flip(tuple(range(3, 3 + geometry.rank)))
    split = found.reshape(
        found.shape[0], geometry.groups, -1, *found.shape[2:]
    )  # (examples, groups, in / groups, positions, …)
    rows = split.movedim(3, 1).movedim(2, 0)  # (groups, examples, positions, in / groups, kernel…)
    return rows.flatten(3).flatten(1, 2).float()


def _spread(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """A transposed convolution's input with zeros between its values, and the padding, which make a plain one of it."""
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], geometry.stride, strict=True)]
    wide = x.new_zeros((*x.shape[:2], *sizes))
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in geometry.stride))] = x
    reach = [d * (k - 1) for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
    padding = tuple(
        (r - before, r - after + extra)
        for r, (before, after), extra in zip(reach, geometry.padding, geometry.output_padding, strict=True)
    )
    return wide, padding


def _batched(geometry: Geometry, tensor: Tensor) -> Tensor:
    """With a batch axis, which convolutions do without for a single example."""
    return tensor if tensor.ndim == geometry.rank + 2 else tensor[None]


def _examples(geometry: Geometry, output: Tensor) -> int:
    return int(output.shape[0]) if output.ndim == geometry.rank + 2 else 1


def _each(value: Any, rank: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(int(size) for size in (sizes * rank if len(sizes) == 1 else sizes))
