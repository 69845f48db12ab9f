"""The array namespace `xp`: the few names that every technique is written with.

NumPy's is here; `whet.torch.namespace` and `whet.keras.namespace` offer the same names. Semantics are NumPy's, with two
rules that the libraries do not share by default: `round` rounds half to even, `argsort` is stable.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np

Array = Any


class Namespace(Protocol):
    """What numerics may call. `axis=None` reduces over everything; reductions take `keepdims`."""

    def abs(self, x: Array) -> Array: ...
    def round(self, x: Array) -> Array: ...
    def floor(self, x: Array) -> Array: ...
    def clip(self, x: Array, low: Array, high: Array) -> Array: ...
    def minimum(self, x: Array, y: Array) -> Array: ...
    def maximum(self, x: Array, y: Array) -> Array: ...
    def where(self, condition: Array, x: Array, y: Array) -> Array: ...
    def exp(self, x: Array) -> Array: ...
    def log(self, x: Array) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def matmul(self, x: Array, y: Array) -> Array: ...
    def transpose(self, x: Array) -> Array: ...
    def moveaxis(self, x: Array, source: int, goal: int) -> Array: ...
    def one_hot(self, x: Array, classes: int) -> Array: ...
    def sum(self, x: Array, axis: Any = None, keepdims: bool = False) -> Array: ...
    def mean(self, x: Array, axis: Any = None, keepdims: bool = False) -> Array: ...
    def min(self, x: Array, axis: Any = None, keepdims: bool = False) -> Array: ...
    def max(self, x: Array, axis: Any = None, keepdims: bool = False) -> Array: ...
    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array: ...
    def concatenate(self, xs: list[Array], axis: int = 0) -> Array: ...
    def argsort(self, x: Array) -> Array: ...
    def kth_smallest(self, xs: list[Array], k: int) -> Array: ...
    def nth_true(self, condition: Array, n: int) -> Array: ...
    def count_nonzero(self, x: Array) -> Array: ...
    def positions(self, x: Array) -> Array: ...
    def searchsorted(self, ordered: Array, x: Array, side: str = "left") -> Array: ...
    def take(self, table: Array, index: Array) -> Array: ...
    def full_like(self, x: Array, value: float) -> Array: ...
    def cast(self, x: Array, dtype: str) -> Array: ...
    def log_softmax(self, x: Array, axis: int = -1) -> Array: ...
    def stop_gradient(self, x: Array) -> Array: ...
    def on_host(self, x: Array) -> Any: ...
    def from_host(self, x: Any) -> Array: ...


class NumpyNamespace:
    """`Namespace` on NumPy arrays."""

    abs = staticmethod(np.abs)
    round = staticmethod(np.round)
    floor = staticmethod(np.floor)
    clip = staticmethod(np.clip)
    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)
    where = staticmethod(np.where)
    exp = staticmethod(np.exp)
    log = staticmethod(np.log)
    sqrt = staticmethod(np.sqrt)
    matmul = staticmethod(np.matmul)
    sum = staticmethod(np.sum)
    mean = staticmethod(np.mean)
    min = staticmethod(np.min)
    max = staticmethod(np.max)
    reshape = staticmethod(np.reshape)
    concatenate = staticmethod(np.concatenate)
    moveaxis = staticmethod(np.moveaxis)
    full_like = staticmethod(np.full_like)
    count_nonzero = staticmethod(np.count_nonzero)

    @staticmethod
    def transpose(x: Array) -> Array:
        """`x` with its last two axes exchanged."""
        return np.swapaxes(x, -1, -2)

    @staticmethod
    def one_hot(x: Array, classes: int) -> Array:
        """Booleans (…, classes): where the integers `x` (…) point; nowhere for one outside [0, classes)."""
        return x[..., None] == np.arange(classes)

    @staticmethod
    def argsort(x: Array) -> Array:
        """Indices that sort the flat array `x` in ascending order; ties keep their order."""
        return np.argsort(x, kind="stable")

    @staticmethod
    def kth_smallest(xs: list[Array], k: int) -> Array:
        """What would be at position `k` if the flat arrays `xs` were sorted together, found without sorting them."""
        together = np.concatenate(xs)
        together.partition(k)
        return together[k]

    @staticmethod
    def nth_true(condition: Array, n: int) -> Array:
        """The position of the true value number `n`, counted from 0, of the flat array `condition`."""
        return np.flatnonzero(condition)[n]

    @staticmethod
    def positions(x: Array) -> Array:
        """0, 1, 2, … for the elements of the flat array `x`, in the integer type of `argsort`."""
        return np.arange(x.shape[0])

    @staticmethod
    def searchsorted(ordered: Array, x: Array, side: str = "left") -> Array:
        """For each of `x`, of any shape, how many of the flat, ascending `ordered` lie below ("right": not above): int32."""
        return np.searchsorted(ordered, x, side=cast(Any, side)).astype(np.int32)

    @staticmethod
    def take(table: Array, index: Array) -> Array:
        """The elements of the flat `table` at `index`, in its shape."""
        return np.take(table, index)

    @staticmethod
    def cast(x: Array, dtype: str) -> Array:
        """`x` as `dtype`, a NumPy dtype name."""
        return np.asarray(x).astype(dtype)

    @staticmethod
    def log_softmax(x: Array, axis: int = -1) -> Array:
        """`x - log(sum(exp(x)))`, without overflow."""
        shifted = x - np.max(x, axis=axis, keepdims=True)
        return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))

    @staticmethod
    def stop_gradient(x: Array) -> Array:
        """`x`: NumPy has no gradients."""
        return x

    @staticmethod
    def on_host(x: Array) -> Any:
        """`x` as a NumPy array, where selecting from one is faster than in this namespace; else None, as here."""

    @staticmethod
    def from_host(x: Any) -> Array:
        """A NumPy array as an array of this namespace."""
        return x


numpy_namespace: Namespace = cast(Any, NumpyNamespace())
