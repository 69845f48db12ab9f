"""Export to LiteRT: the float graph through TensorFlow's converter, then our own codes and scales put into its file.

The converter only ever sees the float model, batch norm folded. Every value that the plan quantizes is one more output
of what it converts, so that the tensor that holds it in the file is known by its index; weights are found in the file
by their exact content.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from whet.errors import ExportError, MissingExtraError
from whet.formats.converters import quiet, run_script, run_tflite
from whet.formats.tflite import Array, File, schema
from whet.formats.tflite_integers import Find
from whet.formats.tflite_tidy import tidy
from whet.formats.tflite_weights import Order, check_plan, finder, put_integers
from whet.graph.placement import Plan
from whet.keras import litert_worker
from whet.keras.clone import Model, Program, Ref, assemble, refs
from whet.keras.model import arrange, short
from whet.keras.quantize import planned, quantized_view
from whet.keras.trace import lowered
from whet.specs import Target


def export_litert(model: Model, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write a .tflite file: float without a plan, else with the plan's codes. Inputs and outputs are float32 either way.

    dynamic: None makes the first axis of every input the batch axis of any size; axes that the model leaves open take the
    example's size. A mapping of input names to axes, `{"image": {1: "height"}}`, leaves those open too. False fixes all.

    Raises:
        ExportError: LiteRT has no such form, the converter fails, or a planned value or weight is not in its file.
        MissingExtraError: TensorFlow or LiteRT is not installed.
    """
    check_plan(plan)
    schema()
    if importlib.util.find_spec("tensorflow") is None:
        raise MissingExtraError("Exporting to LiteRT needs TensorFlow's converter. Install it with: pip install 'whet[keras]'")
    program = lowered(model, example) if plan is None else planned(model, plan, example)
    shapes = shapes_of(program, arrange(model, example), dynamic)
    cuts = _cuts(program, plan, target)
    marks = list(dict.fromkeys([*_marks(program, plan), *cuts]))
    file = File(_float_file(program, shapes, marks, cuts, model.name))
    if len(file.outputs) != len(marks):
        raise ExportError(
            f"The converter made {len(file.outputs)} outputs of {len(marks)}. Please report the model {model.name!r}."
        )
    read = file.inputs[len(refs(program.inputs)) :]
    file.join({index: file.outputs[marks.index(cut)] for cut, index in zip(cuts, read, strict=True)})
    tidy(file)
    where = {mark: index for mark, index in zip(marks, file.outputs, strict=True)}
    inputs = [ref.name for ref in refs(program.inputs)]
    where.update(zip(inputs, file.inputs, strict=True))
    results = refs(program.outputs)
    file.outputs = [where[ref.name] for ref in results]
    file.output_names = output_names(program)
    if plan is not None:
        put_integers(file, plan, where, _finder(program, plan))
    for index, shape, array in zip(file.inputs, shapes, trial(program, arrange(model, example)), strict=True):
        sizes = zip(shape[1:], array.shape[1:], strict=True)  # the size at which the file opens, where an axis is open
        file.tensors[index].shape = [shape[0] or 1, *(size or int(given) for size, given in sizes)]
    content = file.to_bytes(input_names(program))
    path.write_bytes(content)
    arrays = trial(program, arrange(model, example))
    for rows in (1, len(arrays[0])) if all(shape[:1] == [None] for shape in shapes if shape) else (len(arrays[0]),):
        run_tflite(content, [array[:rows] for array in arrays], model.name)


def shapes_of(program: Program, example: Any, dynamic: Any) -> list[list[int | None]]:
    """The shape of every input, None where it stays open."""
    given = refs(program.inputs)
    arrays = keras.tree.flatten(example)
    names = input_names(program)
    wrong = dynamic is not None and dynamic is not False and not isinstance(dynamic, Mapping)
    unknown = [name for name in dynamic if name not in names] if isinstance(dynamic, Mapping) else []
    if wrong or unknown:
        raise ExportError(
            f"dynamic must be None (the batch axis), False, or a mapping of inputs to {{axis: name}}; inputs: "
            f"{', '.join(names)}; got {dynamic!r}."
        )
    shapes = []
    for name, ref, array in zip(names, given, arrays, strict=True):
        extra = set(dynamic.get(name, ())) if isinstance(dynamic, Mapping) else set()
        fixed = [axis for axis in extra if not (0 <= axis < len(ref.shape)) or ref.shape[axis] is not None]
        if fixed:
            raise ExportError(
                f"dynamic names axis {fixed[0]} of the input {name!r}, which the model fixes: its shape is {ref.shape}."
            )
        opened = set() if dynamic is False else {0, *extra}
        sizes = zip(ref.shape, array.shape, strict=True)
        shapes.append([None if s is None and axis in opened else s or int(n) for axis, (s, n) in enumerate(sizes)])
    return shapes


def _marks(program: Program, plan: Plan | None) -> list[str]:
    """The values that the converter must keep as tensors: the model's outputs, and what the plan speaks of."""
    marks = [ref.name for ref in refs(program.outputs)]
    inputs = {ref.name for ref in refs(program.inputs)}
    if plan is not None:
        marks += [name for name in plan.values if name not in inputs]
        if not plan.values:  # the ends of what reads planned weights, so that nothing is multiplied into these
            marks += _ends(program)
    return list(dict.fromkeys(marks))


def _cuts(program: Program, plan: Plan | None, target: Target) -> list[str]:
    """Values at which the converter gets the program in pieces: it would multiply a factor before a layer into its weights.

    They are what planned weights read where an operation unknown to the target has made it, and only moves are between.
    """
    if plan is None:
        return []
    known = target.compute | target.quantized | target.fused
    made = {ref.name: call.node for call in program.calls for ref in refs(call.outputs)}
    found = set()
    for node in program.graph.nodes:
        if node.weight not in plan.weights and node.weight not in plan.casts:
            continue
        source = made.get(node.inputs[0])
        while source is not None and source.op in target.shared and source.inputs:
            source = made.get(source.inputs[0])
        if source is not None and source.op not in known:
            found.add(node.inputs[0])
    return [ref.name for ref in program.values() if ref.name in found]


def _ends(program: Program) -> list[str]:
    """The values behind operations with weights and the activation that alone reads them."""
    readers = program.graph.consumers()
    outputs = set(program.graph.outputs)
    found = []
    for node in program.graph.nodes:
        if node.weight in program.kernels and node.outputs == 1:
            following = readers[node.name]
            fused = len(following) == 1 and following[0].op in ("relu", "relu6") and node.name not in outputs
            found.append(following[0].name if fused else node.name)
    return found


def input_names(program: Program) -> list[str]:
    """The keys of a model that takes a dict, else the names of its input layers."""
    if isinstance(program.inputs, Mapping):
        return sorted(program.inputs)
    return program.input_names


def output_names(program: Program) -> list[str]:
    """The keys of a model that returns a dict, else `output_0`, `output_1`, …"""
    if isinstance(program.outputs, Mapping) and all(isinstance(value, Ref) for value in program.outputs.values()):
        return sorted(program.outputs)
    return [f"output_{i}" for i in range(len(refs(program.outputs)))]


def _float_file(program: Program, shapes: list[list[int | None]], marks: list[str], cuts: list[str], name: str) -> bytes:
    """The float .tflite file of `program` that returns `marks`, made by the converter in a process of its own.

    Each of `cuts` is returned, and taken as a further input, behind the program's own, by what reads it.
    """
    given = [*refs(program.inputs), *(ref for ref in program.values() if ref.name in cuts)]
    shapes = [*shapes, *([ref.shape[0] or shapes[0][0], *ref.shape[1:]] for ref in given[len(shapes) :])]
    pieces: dict[str, Any] = {}
    entries: list[Any] = []

    def insert(ref: Ref, tensor: Any) -> Any:
        if ref.name not in cuts:
            return tensor
        pieces[ref.name] = tensor
        entries.append(keras.Input(batch_shape=ref.shape, dtype=ref.dtype, name=f"cut_{len(entries)}"))
        return entries[-1]

    flat = assemble(program, insert, lambda tensors, _: [pieces.get(mark, tensors[mark]) for mark in marks], entries)
    flat = keras.Model(flat.inputs, flat.outputs, name="model")
    dtypes = [ref.dtype for ref in given]
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        place = Path(folder)
        try:
            with quiet():
                job = _frozen(flat, shapes, dtypes, place) if keras.backend.backend() == "tensorflow" else _saved(flat, place)
        except Exception as cause:
            raise ExportError(f"The model {name!r} could not be handed to TensorFlow's converter: {short(cause)}") from cause
        (place / "job.json").write_text(json.dumps({**job, "shapes": shapes, "dtypes": dtypes}), encoding="utf-8")
        return _run(place, name)


def _frozen(flat: Model, shapes: list[list[int | None]], dtypes: list[str], place: Path) -> dict[str, Any]:
    frozen = litert_worker.freeze(flat, shapes, dtypes)
    (place / "graph.pb").write_bytes(frozen.graph.as_graph_def().SerializeToString())
    # The graph's own inputs come in its order of making; the names carry ours.
    placed = {tensor.name.split(":")[0]: tensor.name for tensor in frozen.inputs}
    inputs = [placed[f"in_{i}"] for i in range(len(shapes))]
    return {"graph": str(place / "graph.pb"), "inputs": inputs, "outputs": [tensor.name for tensor in frozen.outputs]}


def _saved(flat: Model, place: Path) -> dict[str, Any]:
    flat.save(place / "model.keras")
    return {"keras": str(place / "model.keras")}


def _run(place: Path, name: str) -> bytes:
    """The converter's file, or its own words in an error."""
    made = place / "model.tflite"
    script, backend = Path(litert_worker.__file__), {"KERAS_BACKEND": "tensorflow"}
    try:
        run_script(script, [place / "job.json", made], made, "TensorFlow's converter", name, backend)
    except ExportError as cause:
        if "tensor list" not in str(cause):
            raise
        raise ExportError(
            f"{name!r} has a recurrent layer, which LiteRT takes with a batch of one size only: export with dynamic=False for "
            "the example's, or build the layer with unroll=True."
        ) from cause
    return made.read_bytes()


def _finder(program: Program, plan: Plan) -> Find:
    """Weights by their exact content, in the layouts of the operators that may read them."""
    found = []
    for node in program.graph.nodes:
        if node.weight in program.kernels:
            array = np.asarray(quantized_view(program.kernels[str(node.weight)]).array, np.float32)
            found.append((str(node.weight), array, _layouts(node.op, array)))
    return finder(found, plan)


def _layouts(op: str, array: Array) -> dict[str, Order]:
    """The operators that may read a kernel, and its axes there."""
    if op == "linear":
        return {"FULLY_CONNECTED": (1, 0)}
    if op not in ("conv", "conv_transpose"):  # a layer that is not taken for what its class is called
        return {}
    if op == "conv_transpose":
        return {"TRANSPOSE_CONV": (2, 0, 1, 3) if array.ndim == 4 else (1, None, 0, 2)}
    wide = array.ndim == 3  # (width, in, out)
    layouts: dict[str, Order] = {"CONV_2D": (2, None, 0, 1) if wide else (3, 0, 1, 2)}
    if array.shape[-2] == 1:
        layouts["DEPTHWISE_CONV_2D"] = (1, None, 0, 2) if wide else (2, 0, 1, 3)
    return layouts


def trial(program: Program, example: Any) -> list[Array]:
    """The example's arrays in the file's order."""
    return [np.asarray(a).astype(r.dtype) for r, a in zip(refs(program.inputs), keras.tree.flatten(example), strict=True)]
