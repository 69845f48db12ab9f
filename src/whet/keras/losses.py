"""Distillation losses on tensors of any Keras backend, for Whet's loop and for your own."""

from __future__ import annotations

from typing import Any

import keras

from whet.keras.namespace import xp
from whet.numerics.loss_functions import LossFunctions


def wide(tensor: Any) -> Any:
    """16-bit floats as float32; arrays as tensors."""
    tensor = keras.ops.convert_to_tensor(tensor)
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.ops.cast(tensor, "float32") if dtype in ("float16", "bfloat16") else tensor


_losses = LossFunctions(xp, wide, keras.ops.convert_to_tensor)

soft_targets = _losses.soft_targets
binary_soft_targets = _losses.binary_soft_targets
logits_mse = _losses.logits_mse
regression = _losses.regression
dkd = _losses.dkd
dist = _losses.dist
distillation_loss = _losses.distillation_loss
layer_loss = _losses.layer_loss
