"""Masks from `torch.nn.utils.prune`, and back to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.utils import prune as torch_prune

from whet.errors import ModelError
from whet.graph.views import Masks
from whet.torch.views import weight_views


def from_torch_prune_(model: Any) -> Masks:
    """*In place*: take over what `torch.nn.utils.prune` has pruned. Its masks, 1 where kept, by the names of the weights.

    Every `weight_orig` with its `weight_mask` becomes an ordinary `weight` again, the same parameter, with zeros; no hook is
    left. Hand the masks to `Pruner(…, masks=…)`, which holds them. Tensors that are no convolution or linear weight, biases
    say, keep their zeros too, but no mask of ours. `whet.prune`, `fit` and the other verbs do this on their copy by themselves.
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for own in [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]:
            if f"{own}_mask" in module._buffers:
                found[f"{path}.{own}" if path else own] = module._buffers[f"{own}_mask"].detach().cpu().numpy() != 0
                torch_prune.remove(module, own)
    names = {view.name for view in weight_views(model).weights}
    return {name: mask.astype(np.uint8) for name, mask in found.items() if name in names}


def to_torch_prune_(model: Any, masks: Mapping[str, Any]) -> None:
    """*In place*: hand masks to `torch.nn.utils.prune`: `weight_orig`, `weight_mask` and the hook that multiplies them.

    Further calls of `torch.nn.utils.prune` go on from there, and `prune.remove` ends it. `masks` as `Pruner.masks` and
    `Compressed.masks` give them.

    Raises:
        ModelError: there is no such parameter, or a mask has another shape.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, mask in masks.items():
        path, _, own = name.rpartition(".")
        given, parameter = torch.as_tensor(np.asarray(mask)), parameters.get(name)
        if parameter is None or parameter.shape != given.shape:
            got = "there is no such parameter" if parameter is None else f"the parameter has shape {tuple(parameter.shape)}"
            raise ModelError(
                f"There is a mask of shape {tuple(given.shape)} for {name!r}, but {got}. Masks belong to the model they came "
                "from."
            )
        torch_prune.custom_from_mask(modules[path], own, given.to(parameter.device, parameter.dtype))
