"""Quantized weights as torchao's tensors: the same codes and scales, in a model that torchao's kernels and tools take."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from whet.errors import ExportError, MissingExtraError, ModelError
from whet.graph.placement import Plan
from whet.numerics.affine import QParams
from whet.torch.fold import fold_
from whet.torch.model import copy
from whet.torch.quantize import exact_array, float_weights, plan_tensors, replace_


def to_torchao(model: Any, plan: Plan) -> Any:
    """A copy of the float `model` whose linear layers hold `IntxUnpackedToInt8Tensor`s with the codes and scales of `plan`.

    Weights of other layers hold their rounded values in float. The plan must quantize weights alone. Int codes of up to 8 bits
    per channel or per group are taken, with zero points too. torchao stores codes of every width in int8, and lowers these
    tensors further itself.

    Raises:
        ExportError: the plan quantizes activations, or a linear layer's weight in a way that torchao has no such tensor for.
        ModelError: the plan was made for another model.
        MissingExtraError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtraError("Making torchao tensors needs torchao. Install it with: pip install torchao")
    torchao: Any = importlib.import_module("torchao.quantization")
    if plan.values or plan.dynamic:
        raise ExportError(
            "torchao's tensors hold weights, and this plan quantizes activations too. Quantize with activations=None; "
            "torchao's own configs quantize activations."
        )
    work = copy(model).eval()
    exact = float_weights(work, plan)
    fold_(work, dict(plan.folds), exact)
    tensors = plan_tensors(work, plan)
    replace_(tensors, plan)
    linear = {id(module.weight) for module in work.modules() if isinstance(module, torch.nn.Linear)}
    made: dict[int, Any] = {}
    for name, params in plan.weights.items():
        array = exact_array(exact, tensors, name)
        if id(tensors[name]) not in linear:
            tensors[name].data.copy_(torch.from_numpy(plan.rounded(name, array)))
            continue
        codes = torch.from_numpy(plan.encode(name, array)).to(tensors[name].device)
        made[id(tensors[name])] = _tensor(torchao, name, codes, params, tensors[name])
    for name, dtype in plan.casts.items():
        tensors[name].data.copy_(tensors[name].data.to(getattr(torch, dtype)))
    if not made:
        raise ModelError(f"{type(model).__name__} has no quantized linear layer: there is nothing for torchao to hold.")
    for module in work.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) in made:
            module.weight = made[id(module.weight)]
    return work


def _tensor(torchao: Any, name: str, codes: Any, params: Any, old: Any) -> Any:
    """One weight (out, in) as a parameter."""
    if not isinstance(params, QParams) or params.bits > 8 or params.axis != 0:
        raise ExportError(
            f"The weight {name!r} is quantized as {params.spec!r}; torchao's tensors hold Int(2) to Int(8) with a scale for "
            "each channel or group. Quantize with Int(4, granularity=PerGroup(32)), say."
        )
    columns = codes.shape[1]
    size = columns if params.group is None else params.group[1]
    if columns % size:
        raise ExportError(
            f"The weight {name!r} has {columns} input features in groups of {size}, and torchao takes only groups that divide "
            "them. Choose a size that does."
        )
    scale = torch.from_numpy(params.scale.reshape(codes.shape[0], -1)).to(old.device, old.dtype)
    points = torch.from_numpy(params.zero_point.reshape(codes.shape[0], -1)).to(old.device)
    shift = 0 if params.spec.symmetric else 1 << (params.bits - 1)  # torchao's codes are signed
    made = torchao.IntxUnpackedToInt8Tensor(
        qdata=(codes - shift).to(torch.int8),
        scale=scale,
        zero_point=(points - shift).to(torch.int8),
        target_dtype=getattr(torch, f"int{params.bits}"),
        block_size=(1, size),
        dtype=old.dtype,
        activation_quantization=None,
    )
    return torch.nn.Parameter(made, requires_grad=False)
