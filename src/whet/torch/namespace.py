"""The array namespace `xp` on torch tensors: NumPy's names and semantics for what numerics call."""

from __future__ import annotations

from typing import Any

import torch

Array = Any


class TorchNamespace:
    """`whet.numerics.namespace.Namespace` on `torch.Tensor`."""

    abs = staticmethod(torch.abs)
    round = staticmethod(torch.round)
    floor = staticmethod(torch.floor)
    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    sqrt = staticmethod(torch.sqrt)
    matmul = staticmethod(torch.matmul)
    moveaxis = staticmethod(torch.movedim)
    count_nonzero = staticmethod(torch.count_nonzero)

    @staticmethod
    def clip(x: Array, low: Array, high: Array) -> Array:
        """`min(max(x, low), high)`; bounds are numbers or tensors."""
        return torch.clamp(x, low, high)

    @staticmethod
    def minimum(x: Array, y: Array) -> Array:
        """Elementwise least."""
        return torch.minimum(x, y)

    @staticmethod
    def maximum(x: Array, y: Array) -> Array:
        """Elementwise greatest."""
        return torch.maximum(x, y)

    @staticmethod
    def where(condition: Array, x: Array, y: Array) -> Array:
        """`x` where `condition`, else `y`."""
        return torch.where(condition, x, y)

    @staticmethod
    def sum(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        """Sum over `axis`; over no axis when it is ()."""
        return torch.sum(x) if axis is None else x if axis == () else torch.sum(x, dim=axis, keepdim=keepdims)

    @staticmethod
    def mean(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        """Mean over `axis`; over no axis when it is ()."""
        return torch.mean(x) if axis is None else x if axis == () else torch.mean(x, dim=axis, keepdim=keepdims)

    @staticmethod
    def min(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        """Least over `axis`; over no axis when it is ()."""
        return torch.amin(x) if axis is None else x if axis == () else torch.amin(x, dim=axis, keepdim=keepdims)

    @staticmethod
    def max(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        """Greatest over `axis`; over no axis when it is ()."""
        return torch.amax(x) if axis is None else x if axis == () else torch.amax(x, dim=axis, keepdim=keepdims)

    @staticmethod
    def reshape(x: Array, shape: tuple[int, ...]) -> Array:
        """`x` in another shape."""
        return torch.reshape(x, shape)

    @staticmethod
    def concatenate(xs: list[Array], axis: int = 0) -> Array:
        """`xs` joined along `axis`."""
        return torch.cat(xs, dim=axis)

    @staticmethod
    def transpose(x: Array) -> Array:
        """`x` with its last two axes exchanged."""
        return torch.transpose(x, -1, -2)

    @staticmethod
    def one_hot(x: Array, classes: int) -> Array:
        """Booleans (…, classes): where the integers `x` (…) point; nowhere for one outside [0, classes)."""
        return x[..., None] == torch.arange(classes, device=x.device)

    @staticmethod
    def argsort(x: Array) -> Array:
        """Indices that sort the flat array `x` in ascending order; ties keep their order."""
        return torch.argsort(x, stable=True)

    @staticmethod
    def kth_smallest(xs: list[Array], k: int) -> Array:
        """What is at position `k` of the flat arrays `xs` in ascending order, found by selection."""
        return torch.kthvalue(torch.cat(xs), k + 1).values

    @staticmethod
    def nth_true(condition: Array, n: int) -> Array:
        """The position of the true value number `n`, counted from 0, of the flat `condition`."""
        return torch.nonzero(condition)[n, 0]

    @staticmethod
    def positions(x: Array) -> Array:
        """0, 1, 2, … for the elements of the flat array `x`, where `x` is."""
        return torch.arange(x.shape[0], device=x.device)

    @staticmethod
    def searchsorted(ordered: Array, x: Array, side: str = "left") -> Array:
        """For each of `x`, of any shape, how many of the flat, ascending `ordered` lie below ("right": not above): int32."""
        return torch.searchsorted(ordered, x.contiguous(), right=side == "right", out_int32=True)

    @staticmethod
    def take(table: Array, index: Array) -> Array:
        """The elements of the flat `table` at `index`, in its shape."""
        return table[index]

    @staticmethod
    def full_like(x: Array, value: float) -> Array:
        """An array like `x`, all `value`."""
        return torch.full_like(x, value)

    @staticmethod
    def cast(x: Array, dtype: str) -> Array:
        """`x` as `dtype`, a NumPy dtype name."""
        return x.to(getattr(torch, dtype))

    @staticmethod
    def log_softmax(x: Array, axis: int = -1) -> Array:
        """`x - log(sum(exp(x)))`, without overflow."""
        return torch.log_softmax(x, dim=axis)

    @staticmethod
    def stop_gradient(x: Array) -> Array:
        """`x` without its history."""
        return x.detach()

    @staticmethod
    def on_host(x: Array) -> Any:
        """On CPUs the same memory as a NumPy array, whose selection is several times as fast; else None."""
        is_plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        return x.detach().numpy() if is_plain else None

    @staticmethod
    def from_host(x: Any) -> Array:
        """The same memory as a tensor on the CPU."""
        return torch.from_numpy(x)


xp = TorchNamespace()
