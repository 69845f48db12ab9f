"""Export in Keras' own formats: .keras files and TensorFlow's SavedModel folders. Both hold floats."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras

from whet.errors import ExportError, MissingExtraError
from whet.formats.converters import quiet, reason
from whet.graph.placement import Plan
from whet.keras import savedmodel_worker
from whet.keras.clone import Model, assemble, refs
from whet.keras.litert_export import input_names, output_names, shapes_of
from whet.keras.model import arrange, copy, short
from whet.keras.trace import lowered
from whet.specs import Target

_SECONDS = 1800


def export_keras(model: Model, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write the float model as a .keras file: a copy, not compiled. The shapes are the model's own.

    Raises:
        ExportError: the model is quantized, `dynamic` is given, or Keras cannot save it.
    """
    _refuse(plan, ".keras")
    if dynamic is not None:
        raise ExportError(f"A .keras file keeps the shapes of the model's own inputs; dynamic must be None, got {dynamic!r}.")
    try:
        copy(model).save(path)
    except Exception as cause:
        raise ExportError(f"Keras cannot save the model {model.name!r}: {short(cause)}") from cause


def export_savedmodel(
    model: Model, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None
) -> None:
    """Write the float model, batch norm folded, as a SavedModel folder with one signature, `serving_default`.

    A model built under another backend is written by TensorFlow in a process of its own.

    Raises:
        ExportError: the model is quantized, or TensorFlow cannot write it.
        MissingExtraError: TensorFlow is not installed.
    """
    _refuse(plan, "SavedModel")
    if importlib.util.find_spec("tensorflow") is None:
        raise MissingExtraError("Exporting a SavedModel needs TensorFlow. Install it with: pip install 'whet[keras]'")
    program = lowered(model, example)
    given = refs(program.inputs)
    flat = assemble(program, outputs=lambda tensors, _: [tensors[ref.name] for ref in refs(program.outputs)])
    flat = keras.Model(flat.inputs, flat.outputs, name="model")
    job = {
        "names": input_names(program),
        "shapes": shapes_of(program, arrange(model, example), dynamic),
        "dtypes": [ref.dtype for ref in given],
        "outputs": output_names(program),
    }
    if keras.backend.backend() != "tensorflow":
        _write_apart(flat, job, path, model.name)
        return
    try:
        with quiet():
            savedmodel_worker.write(flat, job, str(path))
    except Exception as cause:
        raise ExportError(f"TensorFlow cannot write the model {model.name!r}: {short(cause)}") from cause


def _refuse(plan: Plan | None, kind: str) -> None:
    if plan is not None:
        raise ExportError(
            f"{kind} files hold floats: a quantized model would compute in float there, slower than before. Export it to "
            "LiteRT, ONNX Runtime or OpenVINO, or export the float (pruned) model."
        )


def _write_apart(flat: Model, job: dict[str, Any], path: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        place = Path(folder)
        try:
            flat.save(place / "model.keras")
        except Exception as cause:
            raise ExportError(f"The model {name!r} could not be handed to TensorFlow: {short(cause)}") from cause
        (place / "job.json").write_text(json.dumps({**job, "keras": str(place / "model.keras")}), encoding="utf-8")
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
        command = [sys.executable, "-P", str(Path(savedmodel_worker.__file__)), str(place / "job.json"), str(path)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as cause:
            raise ExportError(f"TensorFlow did not finish on the model {name!r}: {cause}") from cause
    if done.returncode != 0 or not path.is_dir():
        raise ExportError(f"TensorFlow cannot write the model {name!r}: {reason(done)}")
