"""Distillation losses on tensors, for Whet's loop and for your own."""

from __future__ import annotations

from typing import Any

import torch

from whet.numerics.loss_functions import LossFunctions
from whet.torch.namespace import xp


def wide(tensor: Any) -> Any:
    """16-bit floats as float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


_losses = LossFunctions(xp, wide, torch.as_tensor)

soft_targets = _losses.soft_targets
binary_soft_targets = _losses.binary_soft_targets
logits_mse = _losses.logits_mse
regression = _losses.regression
dkd = _losses.dkd
dist = _losses.dist
distillation_loss = _losses.distillation_loss
layer_loss = _losses.layer_loss
