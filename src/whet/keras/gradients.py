"""Gradients of a scalar of a Keras model with respect to its weights, on any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from whet.errors import ModelError
from whet.keras.views import to_numpy


def gradients(loss: Callable[[], Any], variables: Sequence[Any]) -> list[Any | None]:
    """∂loss/∂v for each variable as NumPy arrays, None where the loss does not depend on it. Frozen variables count too.

    `loss` computes a scalar by calling the model that holds the variables.

    Raises:
        ModelError: the backend has no gradients.
    """
    backend = keras.backend.backend()
    found = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}.get(backend)
    if found is None:
        raise ModelError(f"The Keras backend {backend!r} computes no gradients. Take tensorflow, jax or torch.")
    return [None if gradient is None else to_numpy(gradient).astype(np.float32) for gradient in found(loss, variables)]


def _tensorflow(loss: Callable[[], Any], variables: Sequence[Any]) -> list[Any]:
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        for variable in variables:
            tape.watch(variable.value)
        value = loss()
    made = tape.gradient(value, [variable.value for variable in variables])
    return [tf.convert_to_tensor(gradient) if gradient is not None else None for gradient in made]


def _torch(loss: Callable[[], Any], variables: Sequence[Any]) -> list[Any]:
    import torch

    tensors = [variable.value for variable in variables]
    flags = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            return list(torch.autograd.grad(loss(), tensors, allow_unused=True))
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)


def _jax(loss: Callable[[], Any], variables: Sequence[Any]) -> list[Any]:
    import jax

    def value(values: list[Any]) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return loss()

    return list(jax.grad(value)([variable.value for variable in variables]))
