"""The weights of a PyTorch model that can be pruned, each once, with the axes of their channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whet.graph.views import WeightView

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NOT_WEIGHTS = ("bias", "embed", "token", "pos_")  # in the names of bare parameters that are added, not multiplied


@dataclass(frozen=True, slots=True)
class Views:
    """weights: in the order of the model's parameters, tied ones once; skipped: (name, reason) of what cannot be pruned."""

    weights: tuple[WeightView, ...]
    skipped: tuple[tuple[str, str], ...]


def weight_views(model: Any) -> Views:
    """The convolution and linear weights of `model`; `array` is the parameter itself.

    Biases, norms and 1-dimensional parameters are never weights. A bare parameter of two dimensions and more is one,
    named by its path, unless its name or shape says that it is an embedding, a token or a per-channel scale.
    """
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, _EMBEDDINGS)}
    seen: set[int] = set()
    weights: list[WeightView] = []
    skipped: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, _NORMS) or "parametrizations" in path.split("."):
            continue
        hidden = _hidden(module)
        if hidden is not None:
            skipped.append((_join(path, "weight"), hidden))
        for own, parameter in module.named_parameters(recurse=False):
            name = _join(path, own)
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if id(parameter) in embedded:
                skipped.append((name, "embedding weights are not pruned"))
                continue
            axes = _axes(module, own, parameter)
            if isinstance(axes, str):
                skipped.append((name, axes))
            elif axes is not None:
                layer = name if _is_bare(module) else path or name
                weights.append(WeightView(name, layer, parameter, *axes))
    return Views(tuple(weights), tuple(skipped))


def _hidden(module: Any) -> str | None:
    """Why the weight of `module` is not among its parameters; None if it is, or if it has none."""
    if hasattr(module, "parametrizations") and "weight" in module.parametrizations:
        return "parametrized: its weight is computed anew at every read (torch.nn.utils.parametrize.remove_parametrizations)"
    own = module._parameters
    if "weight_orig" in own and "weight_mask" in module._buffers:
        return "pruned by torch.nn.utils.prune: whet.torch.from_torch_prune_(model) takes its masks over"
    if "weight_g" in own and "weight_v" in own:
        return "parametrized: weight_norm computes its weight at every call (torch.nn.utils.remove_weight_norm)"
    return None


def _axes(module: Any, own: str, parameter: Any) -> tuple[int, int | None] | str | None:
    """(out_axis, in_axis) of a weight, the reason why it is skipped, or None for what is no weight at all."""
    if parameter.ndim < 2 or not (parameter.is_floating_point() or parameter.is_complex()) or _hidden(module) is not None:
        return None
    if isinstance(module, _CONV_TRANSPOSE):
        return (1, 0)
    if isinstance(module, _CONV):
        return (0, 1)
    if isinstance(module, nn.Linear | nn.Bilinear | nn.RNNBase | nn.RNNCellBase):
        return (0, 1) if own.startswith("weight") else None
    if isinstance(module, nn.MultiheadAttention):
        return (0, 1) if own.endswith("weight") else None
    if is_conv1d(module):
        return (1, 0)
    if "norm" in type(module).__name__.lower():
        return None
    if "bias" in own:
        return None
    if any(word in own for word in _NOT_WEIGHTS) or (parameter.ndim == 3 and parameter.shape[0] == 1):
        return "a bare parameter that looks like an embedding"
    if sum(size > 1 for size in parameter.shape) < 2:
        return None  # a scale for each channel
    return (0, 1)


def is_conv1d(module: Any) -> bool:
    """Whether `module` is Hugging Face's Conv1D: a linear layer with its weight as (in, out)."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    )


def _is_bare(module: Any) -> bool:
    known = (*_CONV, *_CONV_TRANSPOSE, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    return not isinstance(module, known) and not is_conv1d(module)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
