"""ONNX files from PyTorch models: float, or quantized as a plan says."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whet.errors import ExportError, WhetError, require
from whet.graph.placement import Plan
from whet.specs import Quantize, Target
from whet.torch.convert import Converter, convert
from whet.torch.interception import interceptor_of, map_tensors, tensors_in
from whet.torch.model import call, copy, describe, to_numpy, to_tensors
from whet.torch.onnx_file import rename_dimensions, rename_values, tidy

Tensor = Any
BATCH_AXIS = "batch"
_HALF = (torch.float16, torch.bfloat16)
_LARGEST = 2**31 - 2**20  # bytes of one protobuf message
_TOLERANCE = 1e-3  # of the largest output: what float kernels may differ by


def export(model: Any, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write `model` as an ONNX file at `path`: float without a plan, else as `convert` stores it.

    example: a batch's inputs as `Batches` yields them. dynamic: None makes the first axis of every input the batch axis,
    of any size; False keeps the example's shapes; `{input name: {axis: name}}` names the axes that vary. The file computes
    in float32 where it does not compute in integers; a 16-bit model is stored in 16 bits and cast.

    Raises:
        ExportError: the model cannot be traced (control flow that depends on values), or the file does not do what it must.
        MissingExtraError: the extra `onnx` is not installed.
    """
    if target.suffix != ".onnx":
        raise ExportError(f"PyTorch models are written as .onnx; target {target.name!r} takes {target.suffix} files.")
    optimizer = require("onnxscript.optimizer", "onnx", "Exporting to ONNX")
    onnx = require("onnx", "onnx", "Exporting to ONNX")
    work = _ready(model, plan, target)
    inputs = _at_least_two(to_tensors(example, torch.device("cpu"), torch.float32))
    program = _program(work, inputs, dynamic)
    _check_sites(work, plan)
    with _quietly():
        try:
            written = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
            optimizer.optimize_ir(written.model, should_fold=_should_fold)
            proto = written.model_proto
        except Exception as cause:
            raise ExportError(
                f"{type(model).__name__} was traced, but an operation in it has no ONNX form: {_first_line(cause)}"
            ) from cause
    _name_values(proto, work, inputs, dynamic)
    tidy(proto, importlib.metadata.version("whet"))
    if proto.ByteSize() > _LARGEST:
        raise ExportError(f"The file would have {proto.ByteSize():,} bytes; one ONNX file holds 2 GB. Quantize its weights.")
    onnx.save_model(proto, str(path))
    _check_file(work, path, inputs, dynamic, quantized=plan is not None)


def _ready(model: Any, plan: Plan | None, target: Target) -> Any:
    """A float32 copy on the CPU, converted."""
    if plan is not None and plan.target != target.name:
        raise ExportError(
            f"This plan places quantizers for {plan.target!r} and cannot be written for {target.name!r}. Quantize again with "
            f"target={target.name!r}."
        )
    work = copy(model).eval().cpu()
    halves = {name: str(p.dtype).removeprefix("torch.") for name, p in work.named_parameters() if p.dtype in _HALF}
    work = work.float()
    if plan is None and not halves:
        work.register_forward_hook(_return_plain)
        return work
    plan = plan if plan is not None else Plan(Quantize(), target.name, {}, {}, {})
    folded = {f"{layer}.{name}" for _, layer in plan.folds for name in ("weight", "bias")}
    kept = {*plan.weights, *plan.biases, *folded}
    casts = {name: dtype for name, dtype in halves.items() if name not in kept} | plan.casts
    converted = convert(work, replace(plan, casts=casts))
    converted.register_forward_hook(_return_plain)
    return converted


def _return_plain(module: Any, args: Any, outputs: Any) -> Any:
    return _plain(outputs)


def _plain(outputs: Any) -> Any:
    """Dataclasses and special mappings as dicts, which torch.export knows; entries without a tensor are left out."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if is_dataclass(outputs) and not isinstance(outputs, Mapping | type):
        outputs = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if isinstance(outputs, Mapping):
        return {str(key): _plain(item) for key, item in outputs.items() if any(True for _ in tensors_in(item))}
    if isinstance(outputs, tuple | list):
        return tuple(_plain(item) for item in outputs if any(True for _ in tensors_in(item)))
    return outputs


def _should_fold(node: Any) -> bool | None:
    """Casts of what is stored in 16 bits stay, or the file would hold 32 (None leaves it to the optimizer)."""
    is_half = (
        node.op_type == "Cast" and node.inputs[0].dtype is not None and node.inputs[0].dtype.name in ("FLOAT16", "BFLOAT16")
    )
    return False if is_half else None


def _program(model: Any, inputs: Any, dynamic: Any) -> Any:
    """The exported program of torch.export."""
    args, kwargs = _arguments(inputs)
    try:
        shapes = _dynamic_shapes(inputs, dynamic)
        with _quietly(), torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except WhetError:
        raise
    except Exception as cause:
        raise ExportError(_why_not_traced(model, inputs, cause)) from cause


def _why_not_traced(model: Any, inputs: Any, cause: Exception) -> str:
    name, text = type(model).__name__, f"{type(cause).__name__}: {cause}"
    if "ata-dependent" in text or "DataDependent" in text or "unbacked" in text:
        return (
            f"{name} cannot be written to a file: its forward takes decisions that depend on the values of tensors "
            f"({_first_line(cause)}). It can be simulated. Replace the decision by torch.where, or export the part without it."
        )
    if "specialized" in text or "Constraints violated" in text or "ConstraintViolation" in type(cause).__name__:
        return (
            f"{name} fixes an axis in its code that was to stay dynamic ({_first_line(cause)}). Write its forward with "
            "x.shape[0] in place of a number, or export with dynamic=False for the example's shapes only."
        )
    return f"torch.export cannot trace {name} on {describe(inputs)}: {type(cause).__name__}: {_first_line(cause)}"


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _at_least_two(inputs: Any) -> Any:
    """Two rows or more: torch.export takes a size of 1 for a constant."""
    rows = _rows(inputs)
    return _take(inputs, rows, [0, 0]) if rows == 1 else inputs


def _rows(inputs: Any) -> int:
    sizes = [int(tensor.shape[0]) for tensor in tensors_in(inputs) if tensor.ndim]
    if not sizes:
        raise ExportError(f"The example must hold a tensor with a batch axis, got {describe(inputs)}.")
    return sizes[0]


def _take(inputs: Any, rows: int, index: list[int]) -> Any:
    """The examples at `index`, from every input that has `rows` of them."""
    return map_tensors(inputs, lambda t: t[index] if t.ndim and t.shape[0] == rows else t)


def _dynamic_shapes(inputs: Any, dynamic: Any) -> Any:
    if dynamic is False:
        return None
    rows, batch = _rows(inputs), torch.export.Dim(BATCH_AXIS)
    named = {} if dynamic is None else _named_axes(inputs, dynamic)

    def axes(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            default = {0: batch} if value.ndim and value.shape[0] == rows else {}
            return default if dynamic is None else named.get(name, {})
        if isinstance(value, Mapping):
            return {key: axes(item, str(key)) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(axes(item, name) for item in value)
        return None

    args, kwargs = _arguments(inputs)
    return axes(kwargs, "") if kwargs else tuple(axes(item, f"input:{i}") for i, item in enumerate(args))


def _named_axes(inputs: Any, dynamic: Any) -> dict[str, dict[int, Any]]:
    args, kwargs = _arguments(inputs)
    known = [*kwargs, *(f"input:{i}" for i in range(len(args)))]
    if not isinstance(dynamic, Mapping) or any(name not in known for name in dynamic):
        raise ExportError(
            f"dynamic must be None (the batch axis), False, or a mapping of inputs to {{axis: name}}; inputs: "
            f"{', '.join(known)}; got {dynamic!r}."
        )
    dims: dict[str, Any] = {}
    return {
        name: {int(axis): dims.setdefault(label, torch.export.Dim(label)) for axis, label in axes.items()}
        for name, axes in dynamic.items()
    }


def _check_sites(model: Any, plan: Plan | None) -> None:
    """Every value of the plan must have been produced while tracing."""
    converter = interceptor_of(model)
    if plan is None or not isinstance(converter, Converter):
        return
    missing = sorted(set(plan.values) - converter.reached)
    if missing:
        raise ExportError(
            f"While exporting, the model did not run {missing[0]!r}, which it ran in calibration ({len(missing)} such values): "
            "its forward takes another way when traced. Export with an example like the calibration data."
        )


def _name_values(proto: Any, model: Any, inputs: Any, dynamic: Any) -> None:
    """Inputs are called like the dict's keys or forward's arguments, outputs like the dict's keys; the batch axis `batch`."""
    names = _aliases(model)
    if isinstance(inputs, Mapping) and len(inputs) == len(proto.graph.input):
        names |= {value.name: str(key) for value, key in zip(proto.graph.input, inputs, strict=True)}
    with torch.no_grad():
        outputs = output_names(to_numpy(call(model, inputs)))
    if len(outputs) == len(proto.graph.output) and len({value.name for value in proto.graph.output}) == len(outputs):
        names |= {value.name: name for value, name in zip(proto.graph.output, outputs, strict=True)}
    rename_values(proto, names)
    if dynamic is None:
        first = [value.type.tensor_type.shape.dim for value in proto.graph.input]
        rename_dimensions(proto, {dims[0].dim_param: BATCH_AXIS for dims in first if dims and dims[0].dim_param})


def _aliases(model: Any) -> dict[str, str]:
    """The further names of tied weights -> the first: files and plans call them by one name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            if first.setdefault(id(tensor), name) != name:
                found[name] = first[id(tensor)]
    return found


def output_names(outputs: Any, prefix: str = "") -> list[str]:
    """A name for every array in a model's outputs: keys of dicts, positions in tuples, "output" for a single one."""
    if isinstance(outputs, Mapping):
        parts = [output_names(item, f"{prefix}_{key}" if prefix else str(key)) for key, item in outputs.items()]
    elif isinstance(outputs, tuple | list):
        parts = [output_names(item, f"{prefix or 'output'}_{i}") for i, item in enumerate(outputs)]
    else:
        return [prefix or "output"]
    return [name for part in parts for name in part]


def _check_file(model: Any, path: Path, inputs: Any, dynamic: Any, *, quantized: bool) -> None:
    """Run the file on one example and on three (or on the example's own shapes) and compare with the model."""
    rows = _rows(inputs)
    for index in ([0], [0, 1, 0]) if dynamic is None else (list(range(rows)),):
        batch = _take(inputs, rows, index)
        with torch.no_grad():
            expected = list(tensors_in(call(model, batch)))
        got = _run_file(path, batch)
        for number, (mine, its) in enumerate(zip(expected, got, strict=True)):
            reference = to_numpy(mine)
            where = f"{path.name}, output {number}, batch of {len(index)}"
            if its.shape != reference.shape:
                raise ExportError(f"{where}: the file returns the shape {its.shape}, the model {reference.shape}.")
            _compare(reference, its, where, quantized)


def _compare(reference: Any, got: Any, where: str, quantized: bool) -> None:
    if reference.dtype.kind != "f" or reference.size == 0:
        return
    if not np.isfinite(got).all():
        raise ExportError(f"{where}: the file returns NaN or Inf, the model does not.")
    error = np.abs(reference.astype(np.float64) - got)
    largest = float(np.abs(reference).max())
    # Integer kernels round differently by a step here and there; a file that is wrong is off by the size of the outputs.
    wrong = (
        quantized
        and float(np.sqrt((error**2).mean())) > 0.5 * float(np.sqrt((reference.astype(np.float64) ** 2).mean())) + 1e-6
    )
    if wrong or (not quantized and float(error.max()) > _TOLERANCE * max(largest, 1e-3)):
        raise ExportError(
            f"{where}: the file differs from the model by up to {error.max():.3g} (outputs reach {largest:.3g}). "
            "Please report this model; the file was not kept."
        )


def _run_file(path: Path, inputs: Any) -> list[Any]:
    onnxruntime = require("onnxruntime", "onnx", "Checking ONNX files")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        arrays = [tensor.numpy() for tensor in tensors_in(inputs)]
        if isinstance(inputs, Mapping):
            arrays = [tensor.numpy() for key in names for tensor in tensors_in(inputs.get(key))]
        found: list[Any] = session.run(None, dict(zip(names, arrays, strict=False)))
    except Exception as cause:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the exported file: {_first_line(cause)}"
        ) from cause
    return found


def _first_line(cause: BaseException) -> str:
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's warnings, logging and printing."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
