"""LiteRT files (.tflite) from PyTorch models: the float program through litert-torch, then our own codes put into its file.

The converter only ever sees the float model, batch norm folded. Every value that the plan quantizes is one more output of
what it converts, so that the tensor that holds it in the file is known; weights are found in the file by their exact content.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from whet.errors import ExportError, MissingExtraError
from whet.formats.converters import run_script, run_tflite
from whet.formats.tflite import File, schema
from whet.formats.tflite_integers import Find
from whet.formats.tflite_layout import before_layout, open_batch, tidy_transposes
from whet.formats.tflite_tidy import tidy
from whet.formats.tflite_weights import Order, check_plan, finder, put_integers
from whet.graph.placement import Plan
from whet.specs import Quantize, Target
from whet.torch import litert_worker
from whet.torch.file_check import check_runs, output_names
from whet.torch.fold import fold_
from whet.torch.interception import Session, tensors_in
from whet.torch.model import call, copy, to_numpy, to_tensors
from whet.torch.program import arguments, quietly, ready, row_count, take_rows, trace_program
from whet.torch.quantize import ValueInterceptor, exact_array, float_weights, plan_tensors, replace_

Tensor = Any
_SIZES = (2, 3)  # two batch sizes to convert for: with 1, transposes would become reshapes


def export_litert(model: Any, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write `model` as a .tflite file at `path`: float without a plan, else with the plan's codes. Inputs, channels first as
    in PyTorch, and outputs are float32 either way.

    dynamic: None makes the first axis of every input the batch axis, of any size; False keeps the example's shapes. No other
    axis can vary: the converter takes fixed sizes, and the batch is opened in its file.

    Raises:
        ExportError: LiteRT has no such form, the model cannot be traced or converted, or the file does not do what it must.
        MissingExtraError: litert-torch or LiteRT is not installed.
    """
    check_plan(plan)
    schema()
    if importlib.util.find_spec("litert_torch") is None:
        raise MissingExtraError(
            "Exporting a PyTorch model to LiteRT needs litert-torch. Install it with: pip install 'whet[litert-torch]'"
        )
    inputs = to_tensors(example, torch.device("cpu"), torch.float32)
    rows = row_count(inputs)
    _check_dynamic(inputs, dynamic)
    name = type(model).__name__
    reference = ready(model, plan, target)
    work = ready(copy(model).float(), None, target)
    marker = Marker(work, plan if plan is not None else Plan(Quantize(), target.name, {}, {}, {}))
    sizes = (rows,) if dynamic is False else _SIZES
    batches = [take_rows(inputs, rows, [row % rows for row in range(size)]) for size in sizes]
    programs = [trace_program(work, batch, False) for batch in batches]
    marks = [value for value in (() if plan is None else plan.values) if not value.startswith("input:")]
    missing = sorted(set(marks) - set(marker.marks))
    if missing:
        raise ExportError(
            f"While exporting, the model did not run {missing[0]!r}, which it ran in calibration ({len(missing)} such values): "
            "its forward takes another way when traced. Export with an example like the calibration data."
        )
    files = [File(content) for content in _convert(programs, name)]
    with torch.no_grad():
        names = output_names(to_numpy(call(reference, batches[0])))
    if any(len(file.outputs) != len(names) + len(marker.marks) for file in files):
        raise ExportError(f"The converter left out outputs of {name}. Please report this model.")
    file = files[0]
    if len(files) == 2:
        open_batch(file, files[1], *_SIZES)
    where = _arrange(file, list(marker.marks), len(names))
    where |= {f"input:{k}": index for k, index in enumerate(i for i in file.inputs if file.dtype(i) == "FLOAT32")}
    file.outputs, file.output_names = file.outputs[: len(names)], names
    if plan is not None:
        put_integers(file, plan, where, _finder(marker, plan))
    content = file.to_bytes(_input_names(programs[0], inputs))
    path.write_bytes(content)

    def run(batch: Any) -> list[Any]:
        return run_tflite(content, [to_numpy(tensor) for tensor in tensors_in(batch)], name)

    check_runs(reference, run, path, inputs, dynamic, quantized=plan is not None)


class Marker(ValueInterceptor):
    """The folded float model, which returns the planned values behind its own outputs. marks: those of the last call."""

    def __init__(self, model: Any, plan: Plan) -> None:
        exact = float_weights(model, plan)
        fold_(model, dict(plan.folds), exact)
        tensors = plan_tensors(model, plan)
        replace_(tensors, plan)
        self.arrays = {name: exact_array(exact, tensors, name) for name in (*plan.weights, *plan.casts)}
        super().__init__(model, plan)
        self.marks: dict[str, Tensor] = {}

    def enter(self, session: Session, args: Any, kwargs: Any) -> Any:
        """Forget the marks of the call before; the inputs are as they are."""
        self.marks = {}
        return args, kwargs

    def leave(self, session: Session, outputs: Any) -> Any:
        """A flat list: the model's outputs, then the marks."""
        return [*tensors_in(super().leave(session, outputs)), *self.marks.values()]

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.values:
            self.marks[name] = tensor.clone()  # what later calls write into the tensor does not belong to this value
        return tensor


def _check_dynamic(inputs: Any, dynamic: Any) -> None:
    if dynamic is None or dynamic is False:
        return
    args, kwargs = arguments(inputs)
    known = list(kwargs) if kwargs else [f"input:{k}" for k in range(len(args))]
    raise ExportError(
        "LiteRT files of PyTorch models take dynamic=None (the batch axis is open) or dynamic=False: litert-torch converts "
        f"fixed sizes. Inputs: {', '.join(known)}; got {dynamic!r}."
    )


def _convert(programs: list[Any], name: str) -> list[bytes]:
    """The converter's float file of each program."""
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        place = Path(folder)
        job: dict[str, str] = {}
        for number, program in enumerate(programs):
            with quietly():
                torch.export.save(program, place / f"{number}.pt2")
            job[str(place / f"{number}.pt2")] = str(place / f"{number}.tflite")
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        last = Path(list(job.values())[-1])
        run_script(Path(litert_worker.__file__), [place / "job.json"], last, "litert-torch", name, {})
        return [Path(made).read_bytes() for made in job.values()]


def _arrange(file: File, marks: list[str], count: int) -> dict[str, int]:
    """Where each mark is, in the layout that operators compute in. `count` outputs are the model's own."""
    tidy_transposes(file)
    found = [before_layout(file, index) for index in file.outputs[count:]]
    file.outputs = [*file.outputs[:count], *found]  # tidying leaves them alone
    tidy(file)
    return dict(zip(marks, found, strict=True))


def _finder(marker: Marker, plan: Plan) -> Find:
    return finder(
        [(name, array, layout) for name, array in marker.arrays.items() for layout in _layouts(plan, name, array)], plan
    )


def _layouts(plan: Plan, name: str, array: Any) -> list[dict[str, Order]]:
    """The operators that may read a weight, and its axes there; in several forms where its role is not known."""
    axis = plan.weights[name].axis if name in plan.weights else None
    found: list[dict[str, Order]] = []
    if array.ndim == 2:
        found += [{"FULLY_CONNECTED": order} for out, order in ((0, (0, 1)), (1, (1, 0))) if axis in (out, None)]
    elif array.ndim in (3, 4) and axis in (0, None):
        for rest in ((2, 3),) if array.ndim == 4 else ((None, 2), (2, None)):
            found.append({"CONV_2D": (0, *rest, 1)})
            if array.shape[1] == 1:
                found[-1]["DEPTHWISE_CONV_2D"] = (1, *rest, 0)
    if array.ndim == 4 and axis in (1, None):
        found.append({"TRANSPOSE_CONV": (1, 2, 3, 0)})
    return found


def _input_names(program: Any, inputs: Any) -> list[str]:
    """The keys of a dict of inputs, else the names of forward's arguments."""
    if isinstance(inputs, Mapping):
        return [str(key) for key in inputs]
    return [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
