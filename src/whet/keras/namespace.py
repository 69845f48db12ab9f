"""The array namespace `xp` on Keras tensors, on every backend: `keras.ops` where its semantics are NumPy's."""

from __future__ import annotations

from typing import Any

from keras import ops

Array = Any


class KerasNamespace:
    """`whet.numerics.namespace.Namespace` on Keras backend tensors."""

    abs = staticmethod(ops.abs)
    round = staticmethod(ops.round)
    floor = staticmethod(ops.floor)
    exp = staticmethod(ops.exp)
    log = staticmethod(ops.log)
    sqrt = staticmethod(ops.sqrt)
    matmul = staticmethod(ops.matmul)
    moveaxis = staticmethod(ops.moveaxis)
    clip = staticmethod(ops.clip)
    minimum = staticmethod(ops.minimum)
    maximum = staticmethod(ops.maximum)
    where = staticmethod(ops.where)
    reshape = staticmethod(ops.reshape)
    concatenate = staticmethod(ops.concatenate)
    full_like = staticmethod(ops.full_like)
    cast = staticmethod(ops.cast)
    log_softmax = staticmethod(ops.log_softmax)
    stop_gradient = staticmethod(ops.stop_gradient)

    @staticmethod
    def sum(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        """Sum over `axis`; over no axis when it is (), which Keras on torch takes for all of them."""
        return x if axis == () else ops.sum(x, axis=axis, keepdims=keepdims)

    @staticmethod
    def mean(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        """Mean over `axis`; over no axis when it is ()."""
        return x if axis == () else ops.mean(x, axis=axis, keepdims=keepdims)

    @staticmethod
    def min(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        """Least over `axis`; over no axis when it is ()."""
        return x if axis == () else ops.min(x, axis=axis, keepdims=keepdims)

    @staticmethod
    def max(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        """Greatest over `axis`; over no axis when it is ()."""
        return x if axis == () else ops.max(x, axis=axis, keepdims=keepdims)

    @staticmethod
    def transpose(x: Array) -> Array:
        """`x` with its last two axes exchanged."""
        return ops.swapaxes(x, -1, -2)

    @staticmethod
    def one_hot(x: Array, classes: int) -> Array:
        """Booleans (…, classes): where the integers `x` (…) point; nowhere for one outside [0, classes)."""
        return ops.equal(ops.expand_dims(x, -1), ops.cast(ops.arange(classes), x.dtype))

    @staticmethod
    def argsort(x: Array) -> Array:
        """Indices that sort the flat array `x` in ascending order; ties keep their order on every backend.

        Keras promises no order of ties; its TensorFlow (`tf.argsort`, through top-k), JAX and torch (`stable=True`)
        backends all keep it, and the parity tests hold them to it.
        """
        return ops.argsort(x)

    @staticmethod
    def kth_smallest(xs: list[Array], k: int) -> Array:
        """What is at position `k` of the flat arrays `xs` in ascending order."""
        return ops.sort(ops.concatenate(xs))[k]

    @staticmethod
    def nth_true(condition: Array, n: int) -> Array:
        """The position of the true value number `n`, counted from 0, of the flat array `condition`, as int32."""
        return ops.cast(ops.argmax(ops.cumsum(ops.cast(condition, "int32")) > n), "int32")

    @staticmethod
    def count_nonzero(x: Array) -> Array:
        """How many values of `x` are not zero, as int32."""
        return ops.count_nonzero(x)

    @staticmethod
    def searchsorted(ordered: Array, x: Array, side: str = "left") -> Array:
        """For each of `x`, of any shape, how many of the flat, ascending `ordered` lie below ("right": not above): int32."""
        found = ops.searchsorted(ordered, ops.reshape(x, (-1,)), side=side)
        return ops.cast(ops.reshape(found, ops.shape(x)), "int32")

    @staticmethod
    def take(table: Array, index: Array) -> Array:
        """The elements of the flat `table` at `index`, in its shape."""
        return ops.take(table, index, axis=0)

    @staticmethod
    def positions(x: Array) -> Array:
        """0, 1, 2, … for the elements of the flat array `x`, as int32 like every backend's `argsort`."""
        return ops.arange(ops.shape(x)[0], dtype="int32")

    @staticmethod
    def on_host(x: Array) -> Any:
        """`x` as a NumPy array: no backend selects as fast."""
        return ops.convert_to_numpy(x)

    @staticmethod
    def from_host(x: Any) -> Array:
        """A NumPy array as a tensor of the backend."""
        return ops.convert_to_tensor(x)


xp = KerasNamespace()
