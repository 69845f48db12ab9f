"""What the command reads from files: data, recipes and Keras models. No pickle, ever."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import DataError, ModelError, SpecError, require
from whet.specs import Recipe

_PAIRS = (("x", "y"), ("inputs", "targets"))
_TARGETS = ("y", "targets", "labels")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")
_WRITE = "Write it with numpy.savez(path, x=inputs, y=targets), arrays of numbers."
_JOB = "Write a job.py whose model() builds the model and loads its weights, and give that: see whet compress --help."


def read_npz(path: str | os.PathLike[str]) -> Any:
    """The arrays of an .npz file as whole-array data: inputs, `(inputs, targets)` or `({name: input}, targets)`.

    Keys `x` and `y`, or `inputs` and `targets`; with other names every array is an input of that name but for one named
    `y`, `targets` or `labels`, the targets.

    Raises:
        DataError: no such file, no .npz file, no arrays in it, or arrays of Python objects (which are pickles).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no data file {str(path)!r}.")
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{str(path)!r} is not an .npz file. {_WRITE}")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except OSError as cause:
        raise DataError(f"Cannot read the data file {str(path)!r}: {cause.strerror or cause}.") from cause
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as cause:
        if isinstance(cause, DataError):
            raise
        why = "holds arrays of Python objects, which are pickles" if "pickle" in str(cause) else f"is damaged ({cause})"
        raise DataError(f"{str(path)!r} {why}. {_WRITE}") from cause
    if not arrays:
        raise DataError(f"{str(path)!r} holds no arrays. {_WRITE}")
    return _arrange(arrays, path)


def _arrange(arrays: dict[str, Any], path: Path) -> Any:
    for inputs, targets in _PAIRS:
        if set(arrays) == {inputs, targets}:
            return arrays[inputs], arrays[targets]
        if set(arrays) == {inputs}:
            return arrays[inputs]
    named = [name for name in _TARGETS if name in arrays]
    if len(named) > 1:
        raise DataError(f"{str(path)!r} holds {' and '.join(named)}: only one of them can be the targets.")
    features = {name: array for name, array in arrays.items() if name not in named}
    if not features:
        raise DataError(f"{str(path)!r} holds only targets ({named[0]}). It needs the inputs too, as x or by their names.")
    return (features, arrays[named[0]]) if named else features


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        SpecError: the file cannot be read, or holds no valid recipe.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as cause:
        raise SpecError(f"Cannot read the recipe {os.fspath(path)!r}: {cause.strerror}.") from cause
    except UnicodeDecodeError as cause:
        raise SpecError(f"The recipe {os.fspath(path)!r} is not a text file.") from cause
    return Recipe.from_yaml(text)


def read_keras_model(path: str | os.PathLike[str]) -> Any:
    """The model in a .keras file, loaded without running code from it.

    Raises:
        ModelError: another kind of file, with what to do about it, or a model that Keras cannot load.
        MissingExtraError: Keras is not installed.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise ModelError(
            f"{path.name!r} looks like a pickle, and unpickling runs whatever code is in the file: Whet never does it. {_JOB}"
        )
    if path.suffix in (".onnx", ".tflite"):
        raise ModelError(
            f"{path.name!r} is an exported file. whet measure runs it; compress and inspect take the model itself."
        )
    if path.suffix != ".keras":
        raise ModelError(f"A model is given as job.py or model.keras, got {path.name!r}. {_JOB}")
    if not path.is_file():
        raise ModelError(f"There is no model file {str(path)!r}.")
    keras: Any = require("keras", "keras", "Loading a .keras file")
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as cause:  # Keras raises whatever its layers raise; the cause is shown and chained
        reason = str(cause).strip().split("\n")[0]
        if "safe_mode" in reason:
            reason = "it holds a Lambda layer, whose code is not run from a file."
        raise ModelError(f"Keras cannot load {str(path)!r}: {reason} {_JOB}") from cause


def zeros_like_inputs(model: Any) -> Any:
    """One example of zeros in the shapes of a Keras model's inputs, in the model's own structure.

    Raises:
        DataError: an input has a dimension besides the batch that is not fixed, or the model has no known inputs.
    """
    slots = getattr(model, "inputs", None)
    if not slots:
        raise DataError("This model's input shapes are not known. Pass data to read an example from: --data val.npz.")
    for slot in slots:
        if any(size is None for size in slot.shape[1:]):
            shape = tuple(slot.shape)
            raise DataError(f"The input {slot.name!r} has the open shape {shape}. Pass an example: --data val.npz.")
    arrays = {slot.name: np.zeros((1, *slot.shape[1:]), dtype=slot.dtype) for slot in slots}
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays
