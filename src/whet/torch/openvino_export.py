"""OpenVINO files from PyTorch models, by way of the ONNX model that Whet makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.errors import ExportError, require
from whet.formats import onnx_external
from whet.formats.openvino import from_onnx
from whet.graph.placement import Plan
from whet.specs import Target
from whet.torch.file_check import check_runs
from whet.torch.interception import tensors_in
from whet.torch.onnx_export import build_onnx
from whet.torch.program import first_line


def export_openvino(model: Any, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write `model` as an OpenVINO file at `path` (.xml) with its weights beside it (.bin).

    Float without a plan, else as `convert` stores it, with biases in float. The arguments are those of `export_onnx`.

    Raises:
        ExportError: the model cannot be traced, or the file does not do what it must.
        MissingExtraError: the extra `openvino` is not installed.
    """
    openvino = require("openvino", "openvino", "Exporting to OpenVINO")
    require("onnx", "openvino", "Exporting to OpenVINO")
    proto, work, inputs = build_onnx(model, plan, target, example=example, dynamic=dynamic)
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        source = Path(folder) / "model.onnx"
        onnx_external.save(proto, source)
        del proto
        from_onnx(source, path)
    try:
        opened = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except Exception as cause:
        raise ExportError(f"OpenVINO {openvino.__version__} cannot open the exported file: {first_line(cause)}") from cause
    check_runs(work, lambda batch: _run(opened, batch), path, inputs, dynamic, quantized=plan is not None)


def _run(opened: Any, inputs: Any) -> list[Any]:
    named = {port.get_any_name(): index for index, port in enumerate(opened.inputs)}
    if isinstance(inputs, Mapping):
        arrays = {
            named[str(key)]: tensor.numpy() for key, item in inputs.items() for tensor in tensors_in(item) if key in named
        }
    else:
        arrays = {index: tensor.numpy() for index, tensor in zip(named.values(), tensors_in(inputs), strict=False)}
    try:
        found = opened(arrays)
    except Exception as cause:
        raise ExportError(f"OpenVINO cannot run the exported file: {first_line(cause)}") from cause
    return [found[port] for port in opened.outputs]
