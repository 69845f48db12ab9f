"""Torch functions in canonical words: which operation a call is, and which operands are its weight and bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from whet.torch.interception import Call, tensors_in

Tensor = Any

_CONV = {f"conv{n}d": "conv" for n in (1, 2, 3)} | {f"conv_transpose{n}d": "conv_transpose" for n in (1, 2, 3)}
_PLAIN = {
    "relu": "relu",
    "relu_": "relu",
    "relu6": "relu6",
    "cat": "concat",
    "concat": "concat",
    "concatenate": "concat",
    "max_pool1d": "max_pool",
    "max_pool2d": "max_pool",
    "max_pool3d": "max_pool",
    "avg_pool1d": "avg_pool",
    "avg_pool2d": "avg_pool",
    "avg_pool3d": "avg_pool",
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "reshape": "reshape",
    "view": "reshape",
    "squeeze": "reshape",
    "unsqueeze": "reshape",
    "flatten": "flatten",
    "transpose": "transpose",
    "permute": "transpose",
    "swapaxes": "transpose",
    "t": "transpose",
    "T": "transpose",
    "mT": "transpose",
    "clone": "identity",
    "detach": "identity",
    "contiguous": "identity",
    "dropout": "identity",
    "dropout1d": "identity",
    "dropout2d": "identity",
    "dropout3d": "identity",
    "alpha_dropout": "identity",
    "feature_dropout": "identity",
    "feature_alpha_dropout": "identity",
    "batch_norm": "batch_norm",
}
_SEVERAL_WEIGHTS = {
    "multi_head_attention_forward": "attention",
    "lstm": "lstm",
    "lstm_cell": "lstm",
    "gru": "gru",
    "gru_cell": "gru",
    "rnn_tanh": "rnn",
    "rnn_relu": "rnn",
    "rnn_tanh_cell": "rnn",
    "rnn_relu_cell": "rnn",
}
_CLAMPS = {
    "clamp": (1, "min", 2, "max"),
    "clamp_": (1, "min", 2, "max"),
    "clip": (1, "min", 2, "max"),
    "hardtanh": (1, "min_val", 2, "max_val"),
    "clamp_min": (1, "min", 9, "max"),
    "clamp_min_": (1, "min", 9, "max"),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """What a call is. weight, bias: its operands of that role; axes: (out, in) of the weight; more: further weights, (0, 1)."""

    op: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    axes: tuple[int, int | None] = (0, 1)
    more: tuple[Tensor, ...] = ()


def operation(call: Call, is_weight: Any) -> Operation:
    """The canonical operation of a call; `is_weight(tensor)` tells the model's own tensors from activations.

    A function without a canonical name keeps its own. So does a canonical one whose operands are not what integer kernels
    take: `x + constant` is "add(constant)", a clamp whose lower bound is not 0 is "clamp(…)".
    """
    name = call.function
    if name in _CONV:
        transposed = _CONV[name] == "conv_transpose"
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        return Operation(_CONV[name], weight, bias, (1, 0) if transposed else (0, 1))
    if name == "linear":
        return Operation("linear", call.argument(1, "weight"), call.argument(2, "bias"))
    if name == "addmm" and is_weight(call.argument(2, "mat2")) and call.kwargs.keys() <= {"mat1", "mat2", "input"}:
        # Hugging Face's Conv1D: torch.addmm(bias, x, weight) with a weight of shape (in, out)
        return Operation("linear", call.argument(2, "mat2"), call.argument(0, "input"), (1, 0))
    if name in ("matmul", "mm") and is_weight(call.argument(1, "other")) and call.argument(1, "other").ndim == 2:
        return Operation("linear", call.argument(1, "other"), None, (1, 0))
    if name in ("embedding", "embedding_bag"):
        return Operation("embedding", call.argument(1, "weight"))
    if name in _SEVERAL_WEIGHTS:
        found = [t for t in tensors_in((call.args, call.kwargs)) if t.ndim == 2 and t.is_floating_point() and is_weight(t)]
        return Operation(_SEVERAL_WEIGHTS[name], found[0] if found else None, more=tuple(found[1:]))
    if name in ("add", "add_", "mul", "mul_", "multiply"):
        return Operation(_binary(call, "add" if name.startswith("add") else "mul", is_weight))
    if name in _CLAMPS:
        return Operation(_clamp(call))
    if name == "getitem" and _is_basic(call.args[1]):
        return Operation("slice")
    if name == "adaptive_avg_pool2d" and call.argument(1, "output_size") in (1, (1, 1), [1, 1]):
        return Operation("global_avg_pool")
    return Operation(_PLAIN.get(name, name))


def _is_basic(index: Any) -> bool:
    """Whether indexing with `index` moves values without a look at any."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or (isinstance(part, int | slice) and not isinstance(part, bool)) for part in parts)


def _binary(call: Call, op: str, is_weight: Any) -> str:
    activations = [t for t in call.args[:2] if isinstance(t, torch.Tensor) and t.is_floating_point() and not is_weight(t)]
    if len(activations) < 2 or activations[0].ndim == 0 or activations[1].ndim == 0:
        return f"{op}(constant)"
    return f"{op}(alpha)" if call.kwargs.get("alpha", 1) != 1 else op


def _clamp(call: Call) -> str:
    bounds = clamp_bounds(call)
    if bounds is None:
        return call.function
    return "relu" if bounds == (0, math.inf) else "clamp" if bounds[0] == 0 else f"clamp({bounds[0]:g}, {bounds[1]:g})"


def clamp_bounds(call: Call) -> tuple[float, float] | None:
    """The least and greatest value that a clamp lets through; None for other functions, and for bounds that are tensors."""
    if call.function in ("relu", "relu_"):
        return 0, math.inf
    if call.function == "relu6":
        return 0, 6
    if call.function not in _CLAMPS:
        return None
    at_low, low_name, at_high, high_name = _CLAMPS[call.function]
    is_hardtanh = call.function == "hardtanh"
    low = call.argument(at_low, low_name, -1.0 if is_hardtanh else None)
    high = call.argument(at_high, high_name, 1.0 if is_hardtanh else None)
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        return None
    return -math.inf if low is None else low, math.inf if high is None else high
