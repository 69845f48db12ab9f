"""PyTorch models: checking, copying, moving and running them."""

from __future__ import annotations

import copy as _copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from whet.errors import DataError, ModelError, WhetError
from whet.torch.interception import interceptor_of

_AO = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.ao.nn.qat", "torch.ao.nn.sparse", "torch.ao.quantization")
_QUANTIZED = (*_AO, "torchao", "bitsandbytes", "hqq", "auto_gptq", "gptqmodel", "awq", "optimum.quanto")
_OPERATORS = ("quantized_decomposed.", "torchao.", "torch_ao.", "quantized::", "quantized.")
_HARMLESS = ("QuantStub", "DeQuantStub", "QuantWrapper", "FloatFunctional")  # float modules that live in torch.ao
_WRAPPED = {
    "torch.nn.parallel.data_parallel": "DataParallel: pass model.module",
    "torch.nn.parallel.distributed": "DistributedDataParallel: pass model.module",
    "torch._dynamo.eval_frame": "the result of torch.compile: pass the module that was compiled (model._orig_mod)",
}


def validate(model: Any) -> None:
    """Raise `ModelError` for NaN or Inf weights (naming tensor and index), no weights, or an already quantized model."""
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got a {type(model).__module__}.{type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "This is a TorchScript module, whose code cannot be changed. Pass the torch.nn.Module it was made from."
        )
    wrapped = _WRAPPED.get(type(model).__module__)
    if wrapped is not None:
        raise ModelError(f"This model is {wrapped}.")
    _refuse_quantized(model)
    if not any(parameter.is_floating_point() or parameter.is_complex() for parameter in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no floating-point parameters: there is nothing to compress.")
    for name, parameter in model.named_parameters():
        _check_values(name, parameter, finite=True)
    for name, buffer in model.named_buffers():
        _check_values(name, buffer, finite=name.rpartition(".")[2] in ("running_mean", "running_var"))


def _refuse_quantized(model: Any) -> None:
    if any(interceptor_of(module) is not None for module in model.modules()):
        raise ModelError(
            "Whet has quantized this model already, or prepared it for training. Pass the float model it was made from; a "
            "prepared one becomes a result with whet.finish(model)."
        )
    if isinstance(model, torch.fx.GraphModule):
        for node in model.graph.nodes:
            if str(node.target).startswith(_OPERATORS):
                raise ModelError(
                    f"The graph of this model calls {node.target}: it is quantized already (PT2E). Pass the float module that "
                    "was exported."
                )
    for path, module in model.named_modules():
        home = type(module).__module__
        if home.startswith(_QUANTIZED) and type(module).__name__ not in _HARMLESS:
            raise ModelError(
                f"{path or 'the model'} is a {home}.{type(module).__name__}: this model is quantized already, or "
                "prepared for it. Pass the float model it was made from."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = type(tensor)
        is_wrapper = torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor)
        if tensor.is_quantized or is_wrapper or kind.__module__.startswith(_QUANTIZED):
            raise ModelError(
                f"{name} is a {kind.__module__}.{kind.__name__}, not a plain tensor: it is quantized or sharded already. "
                "Pass the plain float model."
            )


def _check_values(name: str, tensor: Any, *, finite: bool) -> None:
    """Refuse a tensor without values, and NaN in it; Inf too if it must be `finite` (a mask buffer may hold -inf)."""
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        raise ModelError(f"{name} has no shape yet (a lazy module). Call the model once on a batch, then pass it.")
    if tensor.is_meta:
        raise ModelError(f"{name} is on the meta device and has no values. Load the weights first.")
    if tensor.layout != torch.strided:
        raise ModelError(f"{name} has the layout {tensor.layout}; only dense tensors are taken. Call .to_dense() on it.")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    values = tensor.detach()
    if bool(torch.isfinite(values.sum())):  # without an array of answers; a sum that overflows is looked at closely
        return
    good = torch.isfinite(values) if finite else ~torch.isnan(values)
    if not bool(good.all()):
        bad = torch.nonzero(~good)
        index = tuple(int(i) for i in bad[0])
        raise ModelError(
            f"{name} holds {values[index].item()} at index {index} ({len(bad)} of {good.numel()} values are not finite). "
            "Repair the weights, or take an earlier checkpoint."
        )


def copy(model: Any, made: Mapping[int, Any] | None = None) -> Any:
    """An independent copy: training it never changes the original.

    made: copies of single objects that are there already, by the id of the object.

    Raises:
        ModelError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = dict(made or {})
    for module in model.modules():
        for value in vars(module).values():
            # A tensor with a history (old weight_norm keeps its last result) cannot be deep-copied; its values can.
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of the argument trees of a GraphModule
            return _copy.deepcopy(model, memo)
    except Exception as cause:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(cause).__name__}: {cause}), and Whet never works on the original. "
            "Keep open files, locks, generators and tensors with a history out of the model's attributes, "
            "or give it a __deepcopy__."
        ) from cause


def predict(model: Any, inputs: Any) -> Any:
    """Outputs in inference mode as NumPy arrays, in the model's own structure; `inputs` as `Batches` yields them.

    A dict is passed as keyword arguments, a tuple as positional ones. Floating-point inputs take the model's dtype.
    Dataclasses come back as dicts; entries that are not tensors are left out.

    Raises:
        DataError: the model cannot run on `inputs`.
        ModelError: it returned no tensor.
    """
    with evaluating(model), torch.no_grad():
        outputs = to_numpy(call(model, to_tensors(inputs, device_of(model), dtype_of(model))))
    if outputs is None:
        raise ModelError(
            f"{type(model).__name__} returned no tensor. Return a tensor, a tuple, a dict or a dataclass of tensors."
        )
    return outputs


def call(model: Any, inputs: Any) -> Any:
    """`model(**inputs)` for a dict, `model(*inputs)` for a tuple, else `model(inputs)`.

    Raises:
        DataError: the model failed on them; its own error is chained.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except (WhetError, torch.OutOfMemoryError):
        raise
    except Exception as cause:
        raise DataError(
            f"{type(model).__name__} failed on inputs {describe(inputs)}: {type(cause).__name__}: {cause}. "
            "A dict is passed by keyword, a tuple by position; check names, shapes and dtypes."
        ) from cause


def describe(value: Any) -> str:
    """The structure, shapes and dtypes of `value`, for messages."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    if hasattr(value, "shape"):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def to_tensors(value: Any, device: Any, dtype: Any = None) -> Any:
    """Arrays as new tensors on `device`, in the same structure; floating-point ones become `dtype` if it is given."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: to_tensors(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(to_tensors(item, device, dtype) for item in value)
    # Copied, so that a forward that works in place never writes into the user's data.
    tensor = value.detach().clone() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value, order="C"))
    return tensor.to(device=device, dtype=dtype if dtype is not None and tensor.is_floating_point() else None)


def to_numpy(value: Any) -> Any:
    """Tensors as NumPy arrays, 16-bit floats as float32; what is not a tensor is left out, and is None when alone."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping | type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        arrays = {str(key): to_numpy(item) for key, item in value.items()}
        return {key: item for key, item in arrays.items() if item is not None} or None
    if isinstance(value, tuple | list):
        kept = tuple(item for item in map(to_numpy, value) if item is not None)
        return kept or None
    return None


def primary(outputs: Any) -> Any:
    """The tensor that losses and default metrics read: `logits` of a dict or dataclass, else the first one."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, Mapping | type):
        outputs = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        values = [value for value in outputs.values() if value is not None]
        outputs = outputs["logits"] if outputs.get("logits") is not None else values[0] if values else None
    if isinstance(outputs, tuple | list):
        outputs = outputs[0] if outputs else None
    if isinstance(outputs, Mapping | tuple | list):
        return primary(outputs)
    return outputs


def device_of(model: Any) -> Any:
    """The device of the first parameter or buffer."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def dtype_of(model: Any) -> Any:
    """The dtype of the first floating-point parameter: what inputs are cast to."""
    return next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """`model` in inference mode; every module's own mode comes back afterwards, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def on_device(model: Any, device: str | None) -> Iterator[Any]:
    """`model` moved to `device` (None: where it is) while the block runs; yields the device.

    Raises:
        ModelError: there is no such device.
    """
    home = device_of(model)
    if device is None:
        yield home
        return
    try:
        there = torch.device(device)
        torch.empty(0, device=there).cpu()  # fails where nothing can be computed, as on "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        raise ModelError(f"The device {device!r} cannot be used: {str(cause).splitlines()[0]}. Try device='cpu'.") from cause
    model.to(there)
    try:
        yield there
    finally:
        model.to(home)
