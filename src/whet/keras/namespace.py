"""The array namespace `xp` on Keras tensors, on every backend: `keras.ops` where its semantics are NumPy's."""

from __future__ import annotations

from typing import Any

from keras import ops

Array = Any


class KerasNamespace:
    """`whet.numerics.namespace.Namespace` on Keras backend tensors."""

    abs = staticmethod(ops.abs)
    round = staticmethod(ops.round)
    exp = staticmethod(ops.exp)
    clip = staticmethod(ops.clip)
    minimum = staticmethod(ops.minimum)
    maximum = staticmethod(ops.maximum)
    where = staticmethod(ops.where)
    sum = staticmethod(ops.sum)
    mean = staticmethod(ops.mean)
    min = staticmethod(ops.min)
    max = staticmethod(ops.max)
    reshape = staticmethod(ops.reshape)
    concatenate = staticmethod(ops.concatenate)
    full_like = staticmethod(ops.full_like)
    cast = staticmethod(ops.cast)
    log_softmax = staticmethod(ops.log_softmax)
    stop_gradient = staticmethod(ops.stop_gradient)

    @staticmethod
    def argsort(x: Array) -> Array:
        """Indices that sort the flat array `x` in ascending order; ties keep their order on every backend."""
        return ops.argsort(x)


xp = KerasNamespace()
