"""ONNX files from PyTorch models: float, or quantized as a plan says."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from whet.errors import ExportError, require
from whet.formats import onnx_external
from whet.formats.onnx_weights import check_even
from whet.graph.placement import Plan
from whet.specs import Target
from whet.torch.convert import Converter
from whet.torch.file_check import check_runs, output_names
from whet.torch.interception import interceptor_of, tensors_in
from whet.torch.model import to_tensors
from whet.torch.onnx_file import rename_dimensions, rename_values, tidy
from whet.torch.onnx_markers import lower
from whet.torch.onnx_program import write_program
from whet.torch.program import (
    BATCH_AXIS,
    at_least_two,
    check_sites,
    first_line,
    quietly,
    ready,
    trace_program,
)


def export_onnx(model: Any, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write `model` as an ONNX file at `path`: float without a plan, else as `convert` stores it.

    example: a batch's inputs as `Batches` yields them. dynamic: None makes the first axis of every input the batch axis,
    of any size; False keeps the example's shapes; `{input name: {axis: name}}` names the axes that vary. The file computes
    in float32 where it does not compute in integers; a 16-bit model is stored in 16 bits and cast. Weights that one file
    cannot hold (2 GB) are written beside it, in `{name}.data`.

    Raises:
        ExportError: the model cannot be traced (control flow that depends on values), or the file does not do what it must.
        MissingExtraError: the extra `onnx` is not installed.
    """
    proto, work, inputs = build_onnx(model, plan, target, example=example, dynamic=dynamic)
    onnx_external.save(proto, path)
    del proto
    check_runs(work, lambda batch: _run_file(path, batch), path, inputs, dynamic, quantized=plan is not None)


def build_onnx(model: Any, plan: Plan | None, target: Target, *, example: Any, dynamic: Any) -> tuple[Any, Any, Any]:
    """`(ONNX model, converted PyTorch model, inputs it was traced with)`; the arguments are those of `export_onnx`."""
    work = ready(model, plan, target)
    inputs = at_least_two(to_tensors(example, torch.device("cpu"), torch.float32))
    program = trace_program(work, inputs, dynamic)
    check_sites(work, plan)
    outputs = output_names(pytree.tree_unflatten([None] * program.call_spec.out_spec.num_leaves, program.call_spec.out_spec))
    proto = write_program(program)
    if proto is None:
        proto = _by_pytorch(program, type(model).__name__)
    _name_values(proto, work, inputs, outputs, dynamic)
    tidy(proto, importlib.metadata.version("whet"))
    converter = interceptor_of(work)
    if isinstance(converter, Converter):
        weights = converter.stored_weights()
        if target.runtime == "openvino":
            check_even(weights.values())
        lower(proto, weights)
    return proto, work, inputs


def _by_pytorch(program: Any, name: str) -> Any:
    """The ONNX model that PyTorch's own exporter makes of `program`, optimized."""
    optimizer = require("onnxscript.optimizer", "onnx", "Exporting to ONNX")
    with quietly():
        try:
            written = _translated(program)
            optimizer.optimize_ir(written.model, should_fold=_should_fold)
            return written.model_proto
        except Exception as cause:
            raise ExportError(f"{name} was traced, but an operation in it has no ONNX form: {first_line(cause)}") from cause


def _translated(program: Any) -> Any:
    """What PyTorch's exporter makes of `program`.

    It decomposes every program first, which takes three quarters of its time and changes nothing where each operation is
    functional and has an ONNX form of its own. So that is tried first.
    """
    if _is_functional(program):
        program.run_decompositions = lambda *args, **kwargs: program
        try:
            return torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
        except torch.onnx.errors.OnnxExporterError:  # an operation without such a form: what it decomposes into may have one
            del program.run_decompositions
    return torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)


def _is_functional(program: Any) -> bool:
    """Whether no operation of `program` writes into a tensor, and none holds a program of its own."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "get_attr" or (schema is not None and schema.is_mutable):
            return False
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
    return True


def _should_fold(node: Any) -> bool | None:
    """Casts of what is stored in 16 bits stay, or the file would hold 32 (None leaves it to the optimizer)."""
    is_half = (
        node.op_type == "Cast" and node.inputs[0].dtype is not None and node.inputs[0].dtype.name in ("FLOAT16", "BFLOAT16")
    )
    return False if is_half else None


def _name_values(proto: Any, model: Any, inputs: Any, outputs: list[str], dynamic: Any) -> None:
    """Inputs are called like the dict's keys or forward's arguments, outputs like the dict's keys; the batch axis `batch`."""
    names = _aliases(model)
    if isinstance(inputs, Mapping) and len(inputs) == len(proto.graph.input):
        names |= {value.name: str(key) for value, key in zip(proto.graph.input, inputs, strict=True)}
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
