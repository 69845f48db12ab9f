"""ONNX files from PyTorch models: float, or quantized as a plan says."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whet.errors import ExportError, require
from whet.graph.placement import Plan
from whet.specs import Target
from whet.torch.interception import tensors_in
from whet.torch.model import call, to_numpy, to_tensors
from whet.torch.onnx_file import rename_dimensions, rename_values, tidy
from whet.torch.program import (
    BATCH_AXIS,
    at_least_two,
    check_sites,
    first_line,
    quietly,
    ready,
    row_count,
    take_rows,
    trace_program,
)

_LARGEST = 2**31 - 2**20  # bytes of one protobuf message
_TOLERANCE = 1e-3  # of the largest output: what float kernels may differ by


def export_onnx(model: Any, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write `model` as an ONNX file at `path`: float without a plan, else as `convert` stores it.

    example: a batch's inputs as `Batches` yields them. dynamic: None makes the first axis of every input the batch axis,
    of any size; False keeps the example's shapes; `{input name: {axis: name}}` names the axes that vary. The file computes
    in float32 where it does not compute in integers; a 16-bit model is stored in 16 bits and cast.

    Raises:
        ExportError: the model cannot be traced (control flow that depends on values), or the file does not do what it must.
        MissingExtraError: the extra `onnx` is not installed.
    """
    optimizer = require("onnxscript.optimizer", "onnx", "Exporting to ONNX")
    onnx = require("onnx", "onnx", "Exporting to ONNX")
    work = ready(model, plan, target)
    inputs = at_least_two(to_tensors(example, torch.device("cpu"), torch.float32))
    program = trace_program(work, inputs, dynamic)
    check_sites(work, plan)
    with quietly():
        try:
            written = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
            optimizer.optimize_ir(written.model, should_fold=_should_fold)
            proto = written.model_proto
        except Exception as cause:
            raise ExportError(
                f"{type(model).__name__} was traced, but an operation in it has no ONNX form: {first_line(cause)}"
            ) from cause
    _name_values(proto, work, inputs, dynamic)
    tidy(proto, importlib.metadata.version("whet"))
    if proto.ByteSize() > _LARGEST:
        raise ExportError(f"The file would have {proto.ByteSize():,} bytes; one ONNX file holds 2 GB. Quantize its weights.")
    onnx.save_model(proto, str(path))
    _check_file(work, path, inputs, dynamic, quantized=plan is not None)


def _should_fold(node: Any) -> bool | None:
    """Casts of what is stored in 16 bits stay, or the file would hold 32 (None leaves it to the optimizer)."""
    is_half = (
        node.op_type == "Cast" and node.inputs[0].dtype is not None and node.inputs[0].dtype.name in ("FLOAT16", "BFLOAT16")
    )
    return False if is_half else None


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
    rows = row_count(inputs)
    for index in ([0], [0, 1, 0]) if dynamic is None else (list(range(rows)),):
        batch = take_rows(inputs, rows, index)
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
            f"ONNX Runtime {onnxruntime.__version__} cannot run the exported file: {first_line(cause)}"
        ) from cause
    return found
