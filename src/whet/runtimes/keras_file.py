"""Models in .keras files, run by Keras on its present backend: an original beside what was exported from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import RuntimeFileError, require
from whet.runtimes.base import Array, Session, Slot
from whet.runtimes.content import Operation


class KerasSession(Session):
    """A .keras file, called as `model(inputs, training=False)`. It has no threads of its own to set: the backend decides.

    A file that holds code (a Lambda layer) is refused: nothing in a file is run.
    """

    name = "keras"

    def __init__(self, path: Path, threads: int) -> None:
        """Open `path`.

        Raises:
            RuntimeFileError: Keras cannot load the file, or its model has no known inputs.
            MissingExtraError: Keras is not installed.
        """
        keras: Any = require("keras", "keras", "Running a .keras file")
        self.file, self.threads = path.name, threads
        self.version = str(keras.__version__)
        self._backend = str(keras.backend.backend())
        self._model = load(path)
        given, returned = self._model.inputs, self._model.outputs
        self._names = [str(tensor.name) for tensor in given]
        self.inputs = tuple(_slot(str(tensor.name), tensor) for tensor in given)
        self.outputs = tuple(_slot(str(name), tensor) for name, tensor in zip(_names(self._model), returned, strict=True))
        self._tree = keras.tree
        self._call = _compiled(self._model, self._backend)
        self._placed: Any = None
        self._result: Any = None

    @property
    def runtime(self) -> dict[str, str]:
        """The runtime's record, with the backend that computes."""
        return {"name": self.name, "version": self.version, "kernels": self._backend}

    def _place(self, arrays: Sequence[Array]) -> None:
        keras: Any = require("keras", "keras", "Running a .keras file")
        tensors = [keras.ops.convert_to_tensor(array) for array in arrays]
        self._placed = self._tree.pack_sequence_as(self._model.input, tensors)

    def invoke(self) -> None:
        """Compute once on what was placed.

        Raises:
            RuntimeFileError: Keras fails, with its own words.
        """
        try:
            self._result = self._call(self._placed)
        except Exception as cause:
            raise RuntimeFileError(f"Keras could not run {self.file!r}: {cause}") from cause

    def _fetch(self) -> Sequence[Array]:
        keras: Any = require("keras", "keras", "Running a .keras file")
        return [np.asarray(keras.ops.convert_to_numpy(tensor)) for tensor in self._tree.flatten(self._result)]


def load(path: Path) -> Any:
    """The model in a .keras file.

    Raises:
        RuntimeFileError: Keras cannot load it, or it has no known inputs (a subclassed model).
    """
    keras: Any = require("keras", "keras", "Running a .keras file")
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as cause:  # Keras raises whatever its layers raise; the cause is shown and chained
        reason = str(cause).strip().split("\n")[0]
        raise RuntimeFileError(
            f"Keras cannot load {path.name!r}: it is truncated, damaged or foreign. It says: {reason}"
        ) from cause
    if isinstance(model, keras.Sequential):
        model = keras.Model(model.inputs, model.outputs)
    if not getattr(model, "inputs", None):
        raise RuntimeFileError(
            f"{path.name!r} holds a subclassed model, whose inputs are not known. Export it and measure that."
        )
    return model


def stored(path: Path) -> dict[str, int]:
    """Bytes of the weights by type."""
    sizes: dict[str, int] = {}
    for variable in load(path).weights:
        dtype = np.dtype(str(variable.dtype)) if str(variable.dtype) != "bfloat16" else np.dtype("uint16")
        sizes[str(variable.dtype)] = sizes.get(str(variable.dtype), 0) + int(np.prod(variable.shape)) * dtype.itemsize
    return sizes


def weighted(path: Path) -> list[Operation]:
    """The layers with weights."""
    return [operation for operation in computed(path) if operation.weight is not None]


def computed(path: Path) -> list[Operation]:
    """The layers, as operators, with the type that each computes in and the type of its kernel."""
    found = []
    for layer in _layers(load(path)):
        kernel = getattr(layer, "kernel", None)
        bias = getattr(layer, "bias", None)
        channels = getattr(layer, "filters", None)
        weight = None if kernel is None else str(kernel.dtype)
        kept = None if bias is None else str(bias.dtype)
        found.append(Operation(type(layer).__name__, layer.name, str(layer.compute_dtype), weight, kept, channels))
    return found


def _layers(model: Any) -> list[Any]:
    """The layers of a model and of the models in it, without those that only give it inputs."""
    found: list[Any] = []
    for layer in model.layers:
        if type(layer).__name__ != "InputLayer":
            found += _layers(layer) if hasattr(layer, "layers") else [layer]
    return found


def _slot(name: str, tensor: Any) -> Slot:
    return Slot(name, tuple(tensor.shape), str(tensor.dtype))


def _names(model: Any) -> list[str]:
    names = list(model.output_names)
    count = len(model.outputs)
    return names if len(names) == count else [f"output_{index}" for index in range(count)]


def _compiled(model: Any, backend: str) -> Any:
    """The model's call; under TensorFlow as one graph, as `predict` runs it."""
    if backend == "tensorflow":
        tensorflow: Any = require("tensorflow", "keras", "Running a .keras file")
        return tensorflow.function(lambda inputs: model(inputs, training=False), reduce_retracing=True)
    return lambda inputs: model(inputs, training=False)
