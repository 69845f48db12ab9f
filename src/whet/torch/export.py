"""Export: every target has its own writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from whet.errors import ExportError
from whet.graph.placement import Plan
from whet.specs import Target
from whet.torch.executorch_export import export_executorch
from whet.torch.litert_export import export_litert
from whet.torch.onnx_export import export_onnx
from whet.torch.openvino_export import export_openvino
from whet.torch.pt2_export import export_pt2

WRITERS: dict[str, Callable[..., None]] = {
    ".onnx": export_onnx,
    ".xml": export_openvino,
    ".pte": export_executorch,
    ".pt2": export_pt2,
    ".tflite": export_litert,
}


def export(model: Any, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write the file of `target` at `path`: float without a plan, else as `convert` stores it.

    example: a batch's inputs as `Batches` yields them. dynamic: None makes the first axis of every input the batch axis,
    of any size; False keeps the example's shapes; `{input name: {axis: name}}` names the axes that vary.

    Raises:
        ExportError: the model cannot be traced or written, or the file does not do what it must.
        MissingExtraError: the target's extra is not installed.
    """
    writer = WRITERS.get(target.suffix)
    if writer is None:
        raise ExportError(f"A PyTorch model is written to {', '.join(WRITERS)} files; {target.name!r} takes {target.suffix}.")
    writer(model, plan, target, path, example=example, dynamic=dynamic)
