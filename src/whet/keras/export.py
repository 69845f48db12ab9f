"""Export: every file format has its own writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from whet.errors import ExportError
from whet.graph.placement import Plan
from whet.keras.clone import Model
from whet.keras.float_export import export_keras, export_savedmodel
from whet.keras.litert_export import export_litert
from whet.keras.onnx_export import export_onnx
from whet.keras.openvino_export import export_openvino
from whet.specs import Target

WRITERS: dict[str, Callable[..., None]] = {
    ".tflite": export_litert,
    ".onnx": export_onnx,
    ".xml": export_openvino,
    ".keras": export_keras,
    ".savedmodel": export_savedmodel,
}


def export(model: Model, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write the file of `target` at `path`: float without a plan, else with the plan's codes.

    Inputs and outputs are float32 either way. dynamic: None makes the first axis of every input the batch axis of any size;
    axes that the model leaves open take the example's size. A mapping of input names to axes, `{"image": {1: "height"}}`,
    leaves those open too. False fixes all.

    Raises:
        ExportError: the format has no such form, the model cannot be written, or the file does not do what it must.
        MissingExtraError: the target's extra is not installed.
    """
    writer = WRITERS.get(target.suffix)
    if writer is None:
        raise ExportError(f"A Keras model is written to {', '.join(WRITERS)} files; {target.name!r} takes {target.suffix}.")
    writer(model, plan, target, path, example=example, dynamic=dynamic)
