"""SavedModel folders (`.savedmodel`) in TensorFlow, on the CPU, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import RuntimeFileError, require
from whet.runtimes.base import Array, Session, Slot
from whet.runtimes.content import Operation

SIGNATURE = "serving_default"
_NUMBERED = re.compile(r"output_(\d+)")
# TensorFlow's operators with weights.
WEIGHTED = frozenset({"Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3D", "MatMul", "BatchMatMulV2"})
_BOOKKEEPING = frozenset({"Placeholder", "Const", "ReadVariableOp", "NoOp", "Identity", "IdentityN", "Pack", "StridedSlice"})


class SavedModelSession(Session):
    """The signature `serving_default` of a SavedModel. TensorFlow's threads belong to the process and cannot be set here."""

    name = "tensorflow"

    def __init__(self, path: Path, threads: int) -> None:
        """Open `path`.

        Raises:
            RuntimeFileError: TensorFlow cannot load the folder, or it has no such signature.
            MissingExtraError: TensorFlow is not installed.
        """
        tensorflow: Any = require("tensorflow", "keras", "Running a SavedModel")
        self.file, self.threads = path.name, threads
        self.version = str(tensorflow.__version__)
        self._constant = tensorflow.constant
        self._loaded = load(path)  # it owns the variables
        self._call = self._loaded.signatures[SIGNATURE]
        specs = self._call.structured_input_signature[1]
        self.inputs = tuple(_slot(name, specs[name]) for name in _order(self._loaded, list(specs)))
        outputs = self._call.structured_outputs
        self.outputs = tuple(_slot(name, outputs[name]) for name in sorted(outputs, key=_position))
        self._placed: dict[str, Any] = {}
        self._result: dict[str, Any] = {}

    def _place(self, arrays: Sequence[Array]) -> None:
        named = zip(self.inputs, arrays, strict=True)
        self._placed = {slot.name: self._constant(array) for slot, array in named}

    def invoke(self) -> None:
        """Compute once on what was placed.

        Raises:
            RuntimeFileError: TensorFlow fails, with its own words.
        """
        try:
            self._result = self._call(**self._placed)
        except Exception as cause:
            raise RuntimeFileError(f"TensorFlow could not run {self.file!r}: {cause}") from cause

    def _fetch(self) -> Sequence[Array]:
        return [self._result[slot.name].numpy() for slot in self.outputs]


def load(path: Path) -> Any:
    """The SavedModel in a folder.

    Raises:
        RuntimeFileError: TensorFlow cannot load it, or it has no signature `serving_default`.
    """
    tensorflow: Any = require("tensorflow", "keras", "Running a SavedModel")
    try:
        loaded = tensorflow.saved_model.load(str(path))
    except Exception as cause:
        raise RuntimeFileError(
            f"TensorFlow {tensorflow.__version__} cannot load {path.name!r}: it is damaged, or no SavedModel. It says: "
            f"{str(cause).strip().splitlines()[0]}"
        ) from cause
    if SIGNATURE not in loaded.signatures:
        raise RuntimeFileError(f"{path.name!r} has the signatures {sorted(loaded.signatures)}, and none named {SIGNATURE!r}.")
    return loaded


def stored(path: Path) -> dict[str, int]:
    """Bytes of the variables by type."""
    tensorflow: Any = require("tensorflow", "keras", "Reading a SavedModel")
    load(path)
    reader = tensorflow.train.load_checkpoint(str(path / "variables" / "variables"))
    shapes = reader.get_variable_to_shape_map()
    sizes: dict[str, int] = {}
    for name, dtype in reader.get_variable_to_dtype_map().items():
        if name.startswith("_CHECKPOINTABLE") or dtype == tensorflow.string:
            continue
        sizes[dtype.name] = sizes.get(dtype.name, 0) + int(np.prod(shapes[name])) * dtype.size
    return sizes


def weighted(path: Path) -> list[Operation]:
    """The operators with weights."""
    return [operation for operation in computed(path) if operation.weight is not None]


def computed(path: Path) -> list[Operation]:
    """The operators of the signature and of the functions that it calls, as they are written."""
    tensorflow: Any = require("tensorflow", "keras", "Reading a SavedModel")
    function = load(path).signatures[SIGNATURE]
    return list(_operations(function.graph.as_graph_def(), tensorflow))


def _operations(graph: Any, tensorflow: Any) -> Iterator[Operation]:
    called = [function.node_def for function in graph.library.function]
    for node in (node for nodes in (graph.node, *called) for node in nodes):
        if node.op in _BOOKKEEPING or "T" not in node.attr:
            continue
        dtype = tensorflow.as_dtype(node.attr["T"].type).name
        yield Operation(node.op, node.name, dtype, dtype if node.op in WEIGHTED else None)


def _order(loaded: Any, names: list[str]) -> list[str]:
    """The inputs in the order of the function that Keras exported; by name where it does not say."""
    functions = getattr(getattr(loaded, "serve", None), "concrete_functions", ())
    given = [spec.name for spec in functions[0].structured_input_signature[0]] if functions else []
    return given if sorted(given) == sorted(names) else sorted(names)


def _position(name: str) -> tuple[int, str]:
    found = _NUMBERED.fullmatch(name)
    return (int(found[1]) if found else 0, name)


def _slot(name: str, spec: Any) -> Slot:
    return Slot(name, tuple(spec.shape), str(spec.dtype.name))
