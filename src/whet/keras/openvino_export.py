"""OpenVINO files from Keras models, by way of the ONNX model that Whet writes of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from whet.errors import ExportError, require
from whet.formats import onnx_external
from whet.formats.openvino import from_onnx
from whet.graph.placement import Plan
from whet.keras.clone import Model
from whet.keras.model import short
from whet.keras.onnx_export import Built, build_onnx, compare_runs
from whet.specs import Target


def export_openvino(model: Model, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write an OpenVINO file at `path` (.xml) with its weights beside it (.bin): as `export_onnx`, with biases in float.

    Raises:
        ExportError: a layer has no such form, or the file does not do what it must.
        MissingExtraError: OpenVINO or onnx is not installed.
    """
    openvino = require("openvino", "openvino", "Exporting to OpenVINO")
    require("onnx", "openvino", "Exporting to OpenVINO")
    built = build_onnx(model, plan, example=example, dynamic=dynamic)
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        source = Path(folder) / "model.onnx"
        onnx_external.save(built.proto, source)
        from_onnx(source, path)
    compare_runs(built, lambda arrays: _run(openvino, path, built, arrays))


def _run(openvino: Any, path: Path, built: Built, arrays: list[Any]) -> list[Any]:
    try:
        opened = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = opened(dict(zip(built.names, arrays, strict=True)))
    except Exception as cause:
        raise ExportError(f"OpenVINO {openvino.__version__} cannot run the exported file: {short(cause)}") from cause
    return [found[port] for port in opened.outputs]
