"""Batch-norm folding: `γ·(conv(x) - μ)/√(σ² + ε) + β` is a convolution with other weights (Jacob et al. 2018, eq. 14)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from whet.graph.nodes import Graph

FoldedWeights = dict[str, Any]  # parameter name -> float32 tensor, in the convolution's own layout


def foldable(graph: Graph, model: Any) -> dict[str, str]:
    """Batch-norm layer -> convolution or linear layer it can be folded into.

    The pair qualifies when the trace shows that the batch norm alone reads the layer's output, both run once, the layer's
    weight is read by nothing else, its module can hold a bias, and the batch norm has running statistics.
    """
    readers = graph.consumers()
    producer = {value: node for node in graph.nodes for value in node.values}
    layers = [node.layer for node in graph.nodes]
    reads = [node.weight for node in graph.nodes]
    pairs: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "batch_norm" or len(node.inputs) != 1 or layers.count(node.layer) != 1:
            continue
        value = node.inputs[0]
        before = producer.get(value)
        if before is None or before.op not in ("conv", "conv_transpose", "linear") or value in graph.outputs:
            continue
        alone = len(readers[value]) == 1 and reads.count(before.weight) == 1 and layers.count(before.layer) == 1
        if alone and _has_statistics(model, node.layer) and _can_hold_bias(model, before.layer, before.weight, before.bias):
            pairs[node.layer] = before.layer
    return pairs


def folded_weights(model: Any, folds: Mapping[str, str]) -> FoldedWeights:
    """The weight and bias of every layer in `folds` with its batch norm in it, computed in float64, as float32."""
    found: FoldedWeights = {}
    for norm_path, layer in folds.items():
        norm, module = model.get_submodule(norm_path), model.get_submodule(layer)
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        factor = torch.rsqrt(variance + norm.eps)
        factor = factor if norm.weight is None else factor * norm.weight.detach().double()
        shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
        old = torch.zeros_like(mean) if module.bias is None else module.bias.detach().double()
        weight = module.weight.detach().double()
        if hasattr(module, "transposed") and module.transposed:  # (in, out/groups, …): groups lie along the inputs
            groups = weight.reshape(module.groups, -1, *weight.shape[1:])
            scale = factor.reshape(module.groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
            new = (groups * scale).reshape(weight.shape)
        else:
            new = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        found[f"{layer}.weight"] = new.float()
        found[f"{layer}.bias"] = ((old - mean) * factor + shift).float()
    return found


def fold_(model: Any, folds: Mapping[str, str], folded: FoldedWeights) -> None:
    """*In place*: give the layers in `folds` their folded weights. The batch norms must then be passed over."""
    for layer in folds.values():
        module = model.get_submodule(layer)
        for name in ("weight", "bias"):
            new = folded[f"{layer}.{name}"].to(module.weight.dtype)
            setattr(module, name, torch.nn.Parameter(new, requires_grad=module.weight.requires_grad))


def _has_statistics(model: Any, path: str) -> bool:
    norm = model.get_submodule(path)
    return (
        getattr(norm, "running_mean", None) is not None
        and getattr(norm, "running_var", None) is not None
        and hasattr(norm, "eps")
    )


def _can_hold_bias(model: Any, layer: str, weight: str | None, bias: str | None) -> bool:
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        return False
    own = dict(module.named_parameters(recurse=False))
    return weight == f"{layer}.weight" and "weight" in own and "bias" in module._parameters and bias in (None, f"{layer}.bias")
