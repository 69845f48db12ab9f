"""Sparse training: a regularizer for `fit` and for your own loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from whet.errors import ModelError
from whet.keras.namespace import xp
from whet.keras.views import kernels
from whet.numerics.regularizers import group_lasso as penalty


@keras.saving.register_keras_serializable(package="whet")
class GroupLassoRegularizer(keras.regularizers.Regularizer):  # type: ignore[misc]
    """`strength · Σ √|g| ‖w_g‖₂` over the positions `g` of `axis`, the output axis of a kernel; beside another regularizer.

    Wen et al. 2016, arXiv:1608.03665, eq. 1. `L.Conv2D(…, kernel_regularizer=GroupLassoRegularizer(1e-3))`.
    """

    def __init__(self, strength: float = 1e-4, axis: int = -1, beside: Any = None) -> None:
        self.strength, self.axis, self.beside = strength, axis, keras.regularizers.get(beside)

    def __call__(self, x: Any) -> Any:
        """The penalty of one kernel, a scalar."""
        axis = self.axis % len(x.shape)
        total = self.strength * penalty(keras.ops.cast(x, "float32"), axis, xp=xp)
        return total if self.beside is None else total + keras.ops.cast(self.beside(x), "float32")

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        beside = None if self.beside is None else keras.regularizers.serialize(self.beside)
        return {"strength": self.strength, "axis": self.axis, "beside": beside}


@contextmanager
def group_lasso(model: Any, strength: float = 1e-4) -> Iterator[None]:
    """While the block runs, `GroupLassoRegularizer` is on every kernel of `model`, beside its own, and so in the loss of `fit`.

    ```python
    with whet.keras.group_lasso(model, 1e-3):
        model.fit(x, y)
    ```
    Compile the model inside the block, or again after it: what Keras has compiled keeps the penalty.

    Raises:
        ModelError: the model has no convolution or dense kernel.
    """
    found = kernels(model)
    if not found:
        raise ModelError("group_lasso finds no convolution or dense kernel in this model.")
    before = [kernel.variable.regularizer for kernel in found]
    try:
        for kernel, own in zip(found, before, strict=True):
            kernel.variable.regularizer = GroupLassoRegularizer(strength, kernel.out_axis, own)
        yield
    finally:
        for kernel, own in zip(found, before, strict=True):
            kernel.variable.regularizer = own
