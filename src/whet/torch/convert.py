"""Conversion: integer weights and biases stored as such, and a fresh dequantize at every use.

The converted model still runs in PyTorch, with the numbers of the simulation; what it stores is what the file will hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from whet.errors import ExportError
from whet.graph.placement import Plan
from whet.numerics.affine import QParams
from whet.specs import TARGETS
from whet.torch import decomposed
from whet.torch.fold import fold_
from whet.torch.interception import Call, Session
from whet.torch.model import copy
from whet.torch.operations import clamp_bounds
from whet.torch.quantize import ValueQuantizer, bias_codes, exact_array, float_weights, plan_tensors, replace_, simulated

Tensor = Any
_SCALE = "_scale"  # the buffer `weight_scale` beside the codes in `weight`


@dataclass(frozen=True, slots=True)
class Stored:
    """How a stored tensor becomes float again. scale: a number, or the name of the buffer of per-channel scales; None for a
    16-bit float, which is cast."""

    dtype: str
    scale: float | str | None
    axis: int | None = None


def convert(model: Any, plan: Plan) -> Any:
    """A copy of the float `model`, in inference mode, with int8 weights and int32 biases in place of the planned ones.

    Codes of fewer than 8 bits are stored in int8. Per-channel scales are buffers named `weight_scale` beside their codes.

    Raises:
        ExportError: weights or activations of more than 8 bits, for which no target has integer kernels.
        ModelError: the plan was made for another model.
    """
    _check_bits(plan)
    work = copy(model).eval()
    exact = float_weights(work, plan)
    fold_(work, dict(plan.folds), exact)
    tensors = plan_tensors(work, plan)
    replace_(tensors, plan)
    stored: dict[str, Stored] = {}
    for name, params in plan.weights.items():
        codes = plan.encode(name, exact_array(exact, tensors, name)).astype(np.int8)
        stored[name] = _store(work, tensors[name], name, codes, params.scale, params.axis)
    for name in plan.biases:
        int32, scale = bias_codes(exact_array(exact, tensors, name), plan, name)
        stored[name] = _store(work, tensors[name], name, int32, scale, 0 if scale.ndim else None)
    for name, dtype in plan.casts.items():
        stored[name] = Stored(_dtype_name(tensors[name]), None)
        _replace(work, tensors[name], tensors[name].detach().to(getattr(torch, dtype)))
    Converter(work, plan, stored)
    return work


class Converter(ValueQuantizer):
    """Dequantizes what is stored at every use, and emits a quantize-dequantize pair at every value of the plan."""

    def __init__(self, model: Any, plan: Plan, stored: dict[str, Stored]) -> None:
        super().__init__(model, plan)
        self.stored = stored
        self.signed = TARGETS[plan.target].signed_activations
        self.reached: set[str] = set()  # values of the plan that a forward pass produced

    def substitute(self, session: Session, tensor: Tensor) -> Tensor:
        """The float form of a stored tensor."""
        name = session.parameter(tensor)
        kind = None if name is None else self.stored.get(name)
        if kind is None or name is None:
            return tensor
        dtype = getattr(torch, kind.dtype)
        if kind.scale is None:
            return tensor.to(dtype)
        scale = self.model.get_buffer(kind.scale) if isinstance(kind.scale, str) else kind.scale
        return as_dtype(decomposed.dequantize(tensor, scale, kind.axis), dtype)

    def inquire(self, session: Session, func: Any, args: Any, kwargs: Any) -> Any:
        """A stored tensor says that it has the dtype it will be read in."""
        if getattr(getattr(func, "__self__", None), "__name__", "") == "dtype" and args:
            name = session.parameter(args[0])
            if name in self.stored:
                return getattr(torch, self.stored[name].dtype)
        return func(*args, **kwargs)

    def compute(self, session: Session, call: Call, site: str | None) -> Any:
        """Run the call; a clamp that the rounding behind it does anyway is left out."""
        if site in self.values and _rounding_clamps(call, self.values[site]):
            return call.argument(0, "input")
        if torch.compiler.is_exporting():
            return _for_kernels(call)
        return call()

    def round(self, tensor: Tensor, params: QParams) -> Tensor:
        """Codes and back, in the target's storage type."""
        if not torch.compiler.is_exporting():
            return simulated(tensor, params)
        low, high = params.spec.qmin, params.spec.qmax
        zero_point, dtype = int(params.zero_point), torch.int8
        # uint8 and int8 are one lattice shifted by 128
        shift = 128 if params.spec.symmetric and not self.signed else -128 if not params.spec.symmetric and self.signed else 0
        if not self.signed:
            dtype = torch.uint8
        low, high, zero_point = low + shift, high + shift, zero_point + shift
        ends = torch.iinfo(dtype)
        result = decomposed.quantize_dequantize(
            as_dtype(tensor, torch.float32), float(params.scale), zero_point, ends.min, ends.max, dtype
        )
        if (low, high) != (ends.min, ends.max):
            # QuantizeLinear saturates at the ends of its type only; the second pair is exact on the clamped lattice.
            scale = float(params.scale)
            result = torch.clamp(result, (low - zero_point) * scale, (high - zero_point) * scale)
            result = decomposed.quantize_dequantize(result, scale, zero_point, ends.min, ends.max, dtype)
        return as_dtype(result, tensor.dtype)

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.values:
            self.reached.add(name)
        return super()._rounded(name, tensor)


def _for_kernels(call: Call) -> Any:
    """The call as ONNX operators that have integer kernels: linear layers in two dimensions, global pools with a size."""
    x = call.argument(0, "input")
    if call.function == "linear" and x.ndim > 2:
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        flat = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return flat.reshape(-1, *x.shape[1:-1], weight.shape[0])
    if call.function == "adaptive_avg_pool2d" and call.argument(1, "output_size") in (1, (1, 1), [1, 1]):
        if all(isinstance(size, int) for size in x.shape[-2:]):
            return torch.nn.functional.avg_pool2d(x, tuple(x.shape[-2:]))
    return call()


def as_dtype(tensor: Tensor, dtype: Any) -> Tensor:
    """`tensor` as `dtype`; no call at all where it has it (a trace would keep an assertion)."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _rounding_clamps(call: Call, params: QParams) -> bool:
    """Whether `round(clamp(x)) == round(x)` for this clamp from zero: the codes end where the clamp does."""
    bounds = clamp_bounds(call)
    if bounds is None or bounds[0] != 0 or int(params.zero_point) != params.spec.qmin:
        return False
    return float(params.scale) * (params.spec.qmax - params.spec.qmin) <= bounds[1] * (1 + 1e-6)


def _store(model: Any, old: Tensor, name: str, codes: Any, scale: Any, axis: int | None) -> Stored:
    dtype = _dtype_name(old)
    _replace(model, old, torch.from_numpy(codes).to(old.device))
    if axis is None:
        return Stored(dtype, float(scale))
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner).register_buffer(last + _SCALE, torch.from_numpy(np.array(scale)).to(old.device))
    return Stored(dtype, name + _SCALE, axis)


def _replace(model: Any, old: Tensor, new: Tensor) -> None:
    """Put the buffer `new` wherever `model` holds `old`: tied weights stay tied."""
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name in [name for name, tensor in kind.items() if tensor is old]:
                del kind[name]
                module.register_buffer(name, new)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_bits(plan: Plan) -> None:
    for kind, quantizers in (("weight", plan.weights), ("value", plan.values)):
        for name, params in quantizers.items():
            if params.spec.bits > 8:
                raise ExportError(
                    f"The {kind} {name!r} has {params.spec.bits} bits; integer kernels of {plan.target} take at most 8. "
                    "It can be simulated, not exported: choose Int(8) or fewer bits."
                )
