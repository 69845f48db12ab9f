"""Conversion: integer weights and biases stored as such, and a fresh dequantize at every use.

The converted model still runs in PyTorch, with the numbers of the simulation; what it stores is what the file will hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from whet.formats.onnx_weights import StoredWeight
from whet.graph.placement import Plan
from whet.graph.storage import is_plain, refuse
from whet.numerics.affine import QParams
from whet.numerics.codebook import Codebook
from whet.specs import TARGETS, Float
from whet.torch import decomposed, onnx_markers
from whet.torch.arithmetic import named
from whet.torch.fold import fold_
from whet.torch.interception import Call, Session
from whet.torch.model import copy
from whet.torch.operations import clamp_bounds, operation
from whet.torch.qat import finish
from whet.torch.quantize import ValueQuantizer, bias_codes, exact_array, float_weights, plan_tensors, replace_, simulated

Tensor = Any
_SCALE, _ZERO_POINT, _LEVELS = "_scale", "_zero_point", "_levels"  # the buffer `weight_scale` beside the codes in `weight`
_MADE_OF_ONNX = (".onnx", ".xml")


@dataclass(frozen=True, slots=True)
class Stored:
    """How a stored tensor becomes float again. scale: a number, or the name of the buffer of per-channel scales; None for a
    16-bit float, which is cast. params: of what has groups, zero points, levels or more than 8 bits, whose arrays are the
    buffers `weight_scale`, `weight_zero_point` and `weight_levels`. marked: written by `onnx_markers` in an ONNX file."""

    dtype: str
    scale: float | str | None
    axis: int | None = None
    params: QParams | Codebook | None = None
    marked: bool = False


def convert(model: Any, plan: Plan | None = None) -> Any:
    """A copy of the float `model`, in inference mode, with int8 weights and int32 biases in place of the planned ones.

    Codes of fewer than 8 bits are stored in int8, levels as uint8 codes beside their tables, 8-bit floats as such. Per-channel
    scales are buffers named `weight_scale` beside their codes. Without `plan`, `model` is one that `prepare` made.

    Raises:
        ExportError: weights or activations of more bits than integer kernels take, or a scheme that the target cannot hold.
        ModelError: the plan was made for another model.
    """
    if plan is None:
        model, plan = finish(model)
    refuse(plan, TARGETS.get(plan.target))
    work = copy(model).eval()
    exact = float_weights(work, plan)
    fold_(work, dict(plan.folds), exact)
    tensors = plan_tensors(work, plan)
    replace_(tensors, plan)
    stored: dict[str, Stored] = {}
    for name, params in plan.weights.items():
        codes = plan.encode(name, exact_array(exact, tensors, name))
        if is_plain(params):
            stored[name] = _store(work, tensors[name], name, codes.astype(np.int8), params.scale, params.axis)
            stored[name] = replace(stored[name], marked=not plan.values)
        else:
            stored[name] = _store_scheme(work, tensors[name], name, codes, params)
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
        self.params = plan.weights
        self.is_onnx = TARGETS[plan.target].suffix in _MADE_OF_ONNX
        self.read: dict[int, tuple[Tensor, str]] = {}  # markers by id -> the weight that they stand for
        self.reached: set[str] = set()  # values of the plan that a forward pass produced

    def substitute(self, session: Session, tensor: Tensor) -> Tensor:
        """The float form of a stored tensor."""
        name = session.parameter(tensor)
        kind = None if name is None else self.stored.get(name)
        if kind is None or name is None:
            return tensor
        dtype = getattr(torch, kind.dtype)
        if kind.marked and self.is_onnx and torch.compiler.is_exporting():
            made = onnx_markers.weight(name, tensor.shape, dtype)
            self.read[id(made)] = (made, name)
            return made
        if kind.params is not None:
            return as_dtype(self._decoded(name, tensor, kind.params), dtype)
        if kind.scale is None:
            return tensor.to(dtype)
        scale = self.model.get_buffer(kind.scale) if isinstance(kind.scale, str) else kind.scale
        return named(as_dtype(decomposed.dequantize(tensor, scale, kind.axis), dtype), name)

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
            marked = self._marked(call, site) if self.read else None
            return marked if marked is not None else _for_kernels(call)
        return super().compute(session, call, site)

    def _marked(self, call: Call, site: str | None) -> Any:
        """Products and look-ups that read a stored weight themselves; None for other calls."""
        found = operation(call, lambda tensor: id(tensor) in self.read)
        weight: Any = found.weight
        name = self.read[id(weight)][1] if id(weight) in self.read else None
        if name is None or self.stored[name].dtype != "float32":
            return None
        if found.op == "linear" and weight.ndim == 2:
            x = call.argument(1, "mat1") if call.function == "addmm" else call.argument(0, "input")
            turned, columns = found.axes == (0, 1), weight.shape[found.axes[0]]
            return onnx_markers.linear(x, name, found.bias, columns, turned=turned, dynamic=site in self.dynamic)
        if call.function == "embedding" and call.argument(3, "max_norm") is None:
            return onnx_markers.embedding(call.argument(0, "input"), name, weight.shape[1])
        return None

    def stored_weights(self) -> dict[str, StoredWeight]:
        """The codes of the weights that markers stand for, by name."""
        found = {}
        for name, kind in self.stored.items():
            if kind.marked:
                found[name] = StoredWeight(name, _integers(self.model.get_buffer(name), self.params[name]), self.params[name])
        return found

    def _decoded(self, name: str, codes: Tensor, params: QParams | Codebook) -> Tensor:
        """What the codes of a weight with groups, zero points, levels or an 8-bit float stand for."""

        def spread_out(kind: str) -> Tensor:
            return _spread(self.model.get_buffer(name + kind), codes.shape, params)

        if isinstance(params, QParams):
            values = codes.float()
            values = values if params.spec.symmetric else values - spread_out(_ZERO_POINT).float()
        elif isinstance(params.spec, Float):
            values = codes.float()
        else:
            levels, index = self.model.get_buffer(name + _LEVELS), codes.long()
            if params.levels.ndim > 1:
                rows = torch.arange(params.scale.size, device=codes.device).reshape(params.scale.shape)
                index = index + _spread(rows * levels.shape[-1], codes.shape, params)
            values = levels.reshape(-1)[index]
        return values * spread_out(_SCALE)

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


def _store_scheme(model: Any, old: Tensor, name: str, codes: Any, params: QParams | Codebook) -> Stored:
    """Codes with all their arrays as buffers beside them."""
    arrays = {_SCALE: params.scale}
    if isinstance(params, QParams):
        kind = np.dtype(f"{'' if params.spec.symmetric else 'u'}int{8 if params.bits <= 8 else 16}")
        new = torch.from_numpy(codes.astype(kind))
        if not params.spec.symmetric:
            arrays[_ZERO_POINT] = params.zero_point.astype(kind)
    elif isinstance(params.spec, Float):
        new = torch.from_numpy(params.levels[codes]).to(torch.float8_e4m3fn)
    else:
        new = torch.from_numpy(codes.astype(np.uint8))
        arrays[_LEVELS] = params.levels
    _replace(model, old, new.to(old.device))
    owner, _, last = name.rpartition(".")
    for kind_of_array, array in arrays.items():
        tensor = torch.from_numpy(np.array(array, order="C")).to(old.device)
        model.get_submodule(owner).register_buffer(last + kind_of_array, tensor)
    return Stored(_dtype_name(old), None, params=params, marked=True)


def _integers(codes: Tensor, params: QParams | Codebook) -> Any:
    """A buffer of codes as int32: of an 8-bit float the place of each value among all of them."""
    if isinstance(params, Codebook) and isinstance(params.spec, Float):
        return np.searchsorted(params.levels, codes.float().cpu().numpy()).astype(np.int32)
    return codes.cpu().numpy().astype(np.int32)


def _spread(tensor: Tensor, shape: Any, params: QParams | Codebook) -> Tensor:
    """As `affine.spread`."""
    if params.group is not None:
        along, size = params.group
        return torch.repeat_interleave(tensor, size, dim=along).narrow(along, 0, shape[along])
    if params.axis is None:
        return tensor
    return tensor.reshape([-1 if index == params.axis % len(shape) else 1 for index in range(len(shape))])
