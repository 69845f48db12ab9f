"""Run as a script in a process of its own, under Keras' torch backend: layers in .keras files to ONNX files.

It writes what has no rule in `onnx_operations`. There is nothing of Whet in this process. Argument: a JSON file with a list
of {"model": a .keras file, "shapes": of its inputs with None where an axis is open, "path": the ONNX file to write}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(jobs: list[dict[str, Any]]) -> None:
    """Write the ONNX file of every job."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import torch

    for job in jobs:
        model = keras.saving.load_model(job["model"], compile=False).eval()
        try:
            write(torch, model, job)
        except Exception as cause:
            print(f"RuntimeError: the layer {job['name']!r}: {cause}".replace("\n", " "), file=sys.stderr)
            raise SystemExit(1) from None


def write(torch: Any, model: Any, job: dict[str, Any]) -> None:
    """Trace `model` on inputs of the job's shapes and write it; open axes stay open where tracing lets them."""
    arrays = []
    for shape, tensor in zip(job["shapes"], model.inputs, strict=True):
        sizes = [3 if size is None and axis == 0 else 7 if size is None else size for axis, size in enumerate(shape)]
        dtype = getattr(torch, str(tensor.dtype))
        arrays.append(torch.zeros(sizes, dtype=dtype))
    dynamic = [{axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(shape) if size is None} for shape in job["shapes"]]

    class Flat(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            outputs = self.model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
            return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)

    program = torch.export.export(Flat().eval(), tuple(arrays), dynamic_shapes=(tuple(dynamic),), strict=False)
    written = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True)
    written.save(job["path"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
