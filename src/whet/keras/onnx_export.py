"""Export to ONNX: canonical operations by our own rules, with our codes; the rest by torch.onnx, in a process of its own.

The file is written from the same program that simulates the plan, a QuantizeLinear where the plan has a quantizer. A Keras
layer without a rule (attention, LSTM, any keras.ops) is saved alone, traced under Keras' torch backend, and put in its place.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from whet.errors import ExportError, MissingExtraError, require
from whet.formats import onnx_external
from whet.formats.agreement import check_output
from whet.formats.converters import reason
from whet.graph.placement import Plan
from whet.graph.storage import refuse
from whet.keras import onnx_worker
from whet.keras.clone import Call, Model, Program, Ref, assemble, refs, safe
from whet.keras.litert_export import input_names, output_names, shapes_of, trial
from whet.keras.model import arrange, predict, short
from whet.keras.onnx_graph import FIRST, LAST, Array, Late, Writer
from whet.keras.onnx_layers import written_constants
from whet.keras.onnx_operations import MOVES, RULES, Weights, common_form, concat, global_average
from whet.keras.quantize import planned, simulate
from whet.keras.trace import lowered
from whet.numerics.affine import QParams
from whet.specs import TARGETS, Target

_WORKER_SECONDS = 1800
_IR = 10
_OPSET, _OPSET_WIDE = 18, 21  # the latter has codes of 16 bits


@dataclass(frozen=True, slots=True)
class Built:
    """An ONNX model and what it must do. names: of its inputs; arrays: the example for these; opened: it takes any batch."""

    proto: Any
    names: list[str]
    arrays: list[Array]
    expected: list[Array]
    opened: bool
    quantized: bool


def export_onnx(model: Model, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write an ONNX file: float without a plan, else with the plan's codes in quantize-dequantize pairs.

    Raises:
        ExportError: a layer has no ONNX form, or the file does not do what it must.
        MissingExtraError: the extra `onnx` is not installed, or PyTorch where a layer needs it.
    """
    built = build_onnx(model, plan, example=example, dynamic=dynamic)
    onnx_external.save(built.proto, path)
    compare_runs(built, lambda arrays: _run_file(path, built, arrays))


def build_onnx(model: Model, plan: Plan | None, *, example: Any, dynamic: Any = None) -> Built:
    """The ONNX model, not yet run.

    Raises:
        ExportError: a layer has no ONNX form.
        MissingExtraError: the extra `onnx` is not installed, or PyTorch where a layer needs it.
    """
    require("onnx", "onnx", "Exporting to ONNX")
    if plan is not None:
        refuse(plan, TARGETS.get(plan.target), wide=True)
    program = lowered(model, example) if plan is None else planned(model, plan, example)
    arranged = arrange(model, example)
    shapes = shapes_of(program, arranged, dynamic)
    proto = onnx_model(program, plan, shapes, dynamic, model)
    expected = keras.tree.flatten(predict(assemble(program) if plan is None else simulate(model, plan), arranged))
    opened = all(shape[0] is None for shape in shapes if shape)
    return Built(proto, input_names(program), trial(program, arranged), expected, opened, plan is not None)


def onnx_model(program: Program, plan: Plan | None, shapes: list[list[int | None]], dynamic: Any, model: Model) -> Any:
    """The ONNX model of a program, not yet checked."""
    writer = Writer([*input_names(program), *output_names(program)])
    for ref, name in zip(refs(program.inputs), input_names(program), strict=True):
        writer.put(ref, name, LAST, _params(plan, ref))
    weights = Weights(writer, program, plan)
    for call in program.calls:
        _write(writer, call, weights)
    ends = [writer.float(ref.name, LAST) for ref in refs(program.outputs)]
    nodes = _completed(writer, weights, model)
    nodes = _named(writer, nodes, ends, output_names(program), set(input_names(program)))
    return _assembled(writer, nodes, program, plan, shapes, dynamic)


def _params(plan: Plan | None, ref: Ref) -> QParams | None:
    return None if plan is None else plan.values.get(ref.name)


def _write(writer: Writer, call: Call, weights: Weights) -> None:
    """The nodes of one call, and its outputs as values."""
    op, results = call.node.op, refs(call.outputs)
    if len(results) == 1 and all(ref.is_float for ref in (*results, *(call.inputs if op != "embedding" else ()))):
        params = _params(weights.plan, results[0])
        if _move(writer, call, results[0], params):
            return
        made = RULES[op](writer, call, weights) if op in RULES else _concat(writer, call)
        if made is not None:
            tensor, form = made
            if op in ("conv", "conv_transpose", "linear") and weights.plan is not None and weights.plan.values:
                if not weights.is_quantized(call):  # ONNX Runtime would round a float layer between integers on its own
                    tensor = writer.add("Sum", [tensor], f"{call.node.name}_float")
            writer.put(results[0], tensor, form, params)
            return
    weights.settle(call)
    inputs = tuple(writer.float(name, LAST) for name in dict.fromkeys(ref.name for ref in call.inputs))
    outputs = tuple(writer.name(ref.name) for ref in results)
    writer.nodes.append(Late(call, call.node.layer, inputs, outputs))
    for ref, tensor in zip(results, outputs, strict=True):
        writer.put(ref, tensor, LAST, _params(weights.plan, ref))


def _concat(writer: Writer, call: Call) -> tuple[str, str] | None:
    if call.node.op != "concat":
        return None
    form = common_form(writer, call)
    return concat(writer, call, [writer.float(ref.name, form) for ref in call.inputs], form)


def _move(writer: Writer, call: Call, result: Ref, params: QParams | None) -> bool:
    """Operations that only move values, on codes where both sides have the same; the mean of all positions."""
    op, source = call.node.op, call.inputs[0] if call.inputs else None
    if source is None or len(call.inputs) != 1:
        return False
    before = writer.values[source.name]
    on_codes = params is not None and before.params is not None and _equal(params, before.params)
    cuts = params is not None and int(params.zero_point) == params.spec.qmin  # the codes themselves begin at zero
    if op == "identity" or (op == "relu" and cuts):
        if on_codes and params is not None:
            writer.put_codes(result, writer.codes(source.name, before.home), before.home, params)
        else:
            writer.put(result, writer.float(source.name, before.home), before.home, params)
        return True
    if op == "global_avg_pool":
        return _mean(writer, call, result, params)
    if op == "relu" and params is not None and before.params is None and before.home in before.floats:
        # Cut as codes: behind a float Relu that is no cut of the codes' own, ONNX Runtime would compute in float.
        writer.put(result, before.floats[before.home], before.home, params)
        value, (_, zero) = writer.values[result.name], writer.scales(params, result.name)
        value.codes[before.home] = writer.add("Clip", [value.codes[before.home], zero], f"{call.node.name}_codes")
        return True
    if op not in MOVES:
        return False
    rule, form = MOVES[op]
    on_codes = on_codes and op != "pad"  # zeros are not the code 0
    made = rule(writer, call, writer.codes(source.name, form) if on_codes else writer.float(source.name, form))
    if made is None:
        return False
    if on_codes and params is not None:
        writer.put_codes(result, *made, params)
    else:
        writer.put(result, *made, params)
    return True


def _mean(writer: Writer, call: Call, result: Ref, params: QParams | None) -> bool:
    """Quantized while it has its axes, as ONNX Runtime wants to see it."""
    made = global_average(writer, call)
    if made is None:
        return False
    pooled, shape = made
    if shape is None:
        writer.put(result, pooled, FIRST, params)
        return True
    if params is None:
        writer.put(result, writer.reshape(pooled, shape, call.node.name), LAST)
        return True
    writer.put(result, pooled, LAST, params)
    value = writer.values[result.name]
    value.codes[LAST] = writer.reshape(value.codes[LAST], shape, f"{call.node.name}_codes")
    return True


def _equal(one: QParams, other: QParams) -> bool:
    return bool(one.scale == other.scale and one.zero_point == other.zero_point and one.spec == other.spec)


def _completed(writer: Writer, weights: Weights, model: Model) -> list[Any]:
    """The nodes, with what another process writes in its place, on stored weights."""
    late = [node for node in writer.nodes if isinstance(node, Late)]
    written = dict(zip((id(item) for item in late), _traced_apart(writer, late, model), strict=True))
    nodes: list[Any] = []
    for node in tuple(writer.nodes):
        if isinstance(node, Late):
            begin = len(writer.nodes)
            constants = written_constants(writer, weights, node, written[id(node)].graph)
            nodes += [*writer.nodes[begin:], *writer.inline(written[id(node)], node, constants)]
        else:
            nodes.append(node)
    return nodes


def _traced_apart(writer: Writer, late: list[Late], model: Model) -> list[Any]:
    """The ONNX model of every call in `late`, made by PyTorch in a process of its own."""
    if not late:
        return []
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError(
            f"The layer {late[0].call.node.layer!r} ({type(late[0].call.operation).__name__}) is written to ONNX by PyTorch. "
            "Install it with: pip install 'whet[torch,onnx]'"
        )
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        jobs = [_job(item, Path(folder) / str(index)) for index, item in enumerate(late)]
        job = Path(folder) / "jobs.json"
        job.write_text(json.dumps(jobs), encoding="utf-8")
        _run(job, model.name)
        return [writer.onnx.load(item["path"]) for item in jobs]


def _job(late: Late, place: Path) -> dict[str, Any]:
    """Save one call alone as a model; where."""
    call = late.call
    made = {ref.name: keras.Input(batch_shape=ref.shape, dtype="float32" if ref.is_float else ref.dtype) for ref in call.inputs}

    def put(leaf: Any) -> Any:
        return made.get(leaf.name, leaf) if isinstance(leaf, Ref) else leaf

    kind = type(call.operation)
    if not kind.__module__.startswith("keras."):
        raise ExportError(
            f"The layer {call.node.layer!r} is of a class of your own ({kind.__name__}), which has no rule for ONNX and which "
            "another process cannot load. Write it with Keras layers and keras.ops in a functional model, or export to LiteRT."
        )
    try:
        args, kwargs = keras.tree.map_structure(put, (call.args, call.kwargs))
        alone = keras.Model(list(made.values()), call.operation(*args, **kwargs), name=safe(call.node.layer))
        alone.save(f"{place}.keras")
    except Exception as cause:
        raise ExportError(f"The layer {call.node.layer!r} has no ONNX form: {short(cause)}") from cause
    return {
        "model": f"{place}.keras",
        "shapes": [list(t.shape) for t in made.values()],
        "path": f"{place}.onnx",
        "name": call.node.layer,
    }


def _run(job: Path, name: str) -> None:
    """Let the worker write every ONNX file of a job."""
    environment = {**os.environ, "KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-P", "-W", "ignore", str(Path(onnx_worker.__file__)), str(job)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_WORKER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as cause:
        raise ExportError(f"PyTorch's exporter did not finish on the model {name!r}: {cause}") from cause
    if done.returncode != 0:
        raise ExportError(f"A layer of the model {name!r} has no rule for ONNX, and PyTorch's exporter failed: {reason(done)}")


def _named(writer: Writer, nodes: list[Any], ends: list[str], names: list[str], inputs: set[str]) -> list[Any]:
    """`nodes` with the outputs under their names, and without those that nothing reads."""
    new: dict[str, str] = {}
    for end, name in zip(ends, names, strict=True):
        if end in inputs or end in new or end in writer.constants:
            nodes.append(writer.onnx.helper.make_node("Identity", [end], [name]))
        else:
            new[end] = name
    wanted = set(names)
    kept = []
    for node in reversed(nodes):
        for index, old in enumerate(node.output):
            node.output[index] = new.get(old, old)
        for index, old in enumerate(node.input):
            node.input[index] = new.get(old, old)
        if any(output in wanted for output in node.output):
            kept.append(node)
            wanted |= {*node.input} | _read_inside(node)
    return kept[::-1]


def _read_inside(node: Any) -> set[str]:
    """What the graphs inside a node read."""
    inner = [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]
    return {name for graph in inner for n in graph.node for name in {*n.input} | _read_inside(n)} | {
        value.name for graph in inner for value in graph.output
    }


def _assembled(
    writer: Writer, nodes: list[Any], program: Program, plan: Plan | None, shapes: list[list[int | None]], dynamic: Any
) -> Any:
    helper, proto = writer.onnx.helper, writer.onnx.TensorProto

    def info(name: str, ref: Ref, shape: Any) -> Any:
        kind = proto.FLOAT if ref.is_float else helper.np_dtype_to_tensor_dtype(np.dtype(ref.dtype))
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = []
    for name, ref, shape in zip(input_names(program), refs(program.inputs), shapes, strict=True):
        known = dynamic.get(name, {}) if isinstance(dynamic, Mapping) else {}
        words = [str(known.get(axis, "batch" if axis == 0 else f"{name}_{axis}")) for axis in range(len(shape))]
        inputs.append(info(name, ref, [word if size is None else size for word, size in zip(words, shape, strict=True)]))
    fixed = all(shape[0] is not None for shape in shapes if shape)
    outputs = []
    for name, ref in zip(output_names(program), refs(program.outputs), strict=True):
        first = [None if fixed or ref.shape[0] is not None else "batch"] if ref.shape else []
        outputs.append(info(name, ref, [*(ref.shape[:1] if first == [None] else first), *ref.shape[1:]]))
    read = {name for node in nodes for name in {*node.input} | _read_inside(node)}
    kept = [writer.onnx.numpy_helper.from_array(array, name) for name, array in writer.constants.items() if name in read]
    graph = helper.make_graph(nodes, "model", inputs, outputs, kept)
    used = [array.dtype for array in writer.constants.values()]
    wide = any(dtype in (np.int16, np.uint16) or dtype.kind == "V" for dtype in used)  # V: 4 bits, and 8-bit floats
    wide = wide or any(attribute.name == "block_size" for node in nodes for attribute in node.attribute)
    opsets = [helper.make_opsetid("", _OPSET_WIDE if wide else _OPSET)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
    made.producer_name, made.producer_version = "whet", importlib.metadata.version("whet")
    return made


def compare_runs(built: Built, run: Callable[[list[Array]], list[Array]]) -> None:
    """Run a file on the example, and on one row of it where its batch is open, and compare with what is expected.

    Raises:
        ExportError: other shapes or values.
    """
    whole = len(built.arrays[0])
    for rows in (1, whole) if built.opened else (whole,):
        found = run([array[:rows] for array in built.arrays])
        for number, (mine, its) in enumerate(zip(built.expected, found, strict=True)):
            expected = mine if rows == whole else mine[:rows]
            check_output(expected, its, f"output {number}, batch of {rows}", quantized=built.quantized)


def _run_file(path: Path, built: Built, arrays: list[Array]) -> list[Array]:
    onnxruntime = require("onnxruntime", "onnx", "Checking ONNX files")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found: list[Array] = session.run(None, dict(zip(built.names, arrays, strict=True)))
    except Exception as cause:
        version = onnxruntime.__version__
        raise ExportError(f"ONNX Runtime {version} cannot run the exported file: {short(cause)}") from cause
    return found
