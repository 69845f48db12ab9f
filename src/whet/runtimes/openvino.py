"""OpenVINO files in OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import RuntimeFileError, require
from whet.runtimes.base import Array, Session, Slot

# OpenVINO's names of types -> NumPy's.
TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "boolean": "bool"} | {
    f"{sign}{bits}": f"{name}{bits}" for sign, name in (("i", "int"), ("u", "uint")) for bits in (4, 8, 16, 32, 64)
}


class OpenVINOSession(Session):
    """An .xml file with its .bin, compiled for latency on one stream.

    What is not quantized runs in `precision`: float32 by default, and activations beside integer weights are not rounded on
    the fly. None leaves both to OpenVINO, which takes bfloat16 where the processor has it; the record says which it took.
    """

    name = "openvino"

    def __init__(self, path: Path, threads: int, *, precision: str | None = "f32") -> None:
        """Open `path`.

        Raises:
            RuntimeFileError: the file is truncated, foreign, or its .bin is missing or too short.
            MissingExtraError: OpenVINO is not installed.
        """
        self.file, self.threads = path.name, threads
        runtime: Any = require("openvino", "openvino", "Running an OpenVINO file")
        self.version = str(runtime.__version__)
        self._tensor = runtime.Tensor
        self.compiled = compiled(path, threads, precision)
        taken = str(self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self.precision = TYPES.get(taken, "float32") + ("" if precision is not None else " (automatic)")
        self.inputs = tuple(self._slot(port) for port in self.compiled.inputs)
        self.outputs = tuple(self._slot(port) for port in self.compiled.outputs)
        self._request = self.compiled.create_infer_request()
        self._placed: Sequence[Any] = ()

    @property
    def runtime(self) -> dict[str, str]:
        """The runtime's record, with the type that computes where nothing is quantized."""
        return {"name": self.name, "version": self.version, "precision": self.precision}

    def _slot(self, port: Any) -> Slot:
        kind = port.get_element_type().get_type_name()
        name = port.get_any_name() if port.get_names() else port.get_node().get_friendly_name()
        if kind not in TYPES or kind == "bf16":
            raise RuntimeFileError(f"{name!r} of {self.file!r} is a {kind}; NumPy has no such type.")
        shape = tuple(None if size.is_dynamic else int(size.get_length()) for size in port.get_partial_shape())
        return Slot(name, shape, TYPES[kind])

    def _place(self, arrays: Sequence[Array]) -> None:
        # The tensors point into the arrays, which must live as long.
        self._placed = [np.ascontiguousarray(array) for array in arrays]
        for index, array in enumerate(self._placed):
            self._request.set_input_tensor(index, self._tensor(array, shared_memory=True))

    def invoke(self) -> None:
        """Compute once on what was placed.

        Raises:
            RuntimeFileError: OpenVINO fails, with its own words.
        """
        try:
            self._request.infer(share_outputs=True)
        except Exception as cause:
            raise RuntimeFileError(f"OpenVINO could not run {self.file!r}: {cause}") from cause

    def _fetch(self) -> Sequence[Array]:
        return [np.array(self._request.get_output_tensor(index).data) for index in range(len(self.outputs))]


def compiled(path: Path, threads: int, precision: str | None) -> Any:
    """An `openvino.CompiledModel` for this processor.

    Raises:
        RuntimeFileError: the file cannot be opened.
        MissingExtraError: OpenVINO is not installed.
    """
    runtime: Any = require("openvino", "openvino", "Running an OpenVINO file")
    model = read(path)
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    if precision is not None:
        options |= {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    try:
        return runtime.Core().compile_model(model, "CPU", options)
    except Exception as cause:
        raise RuntimeFileError(f"OpenVINO {runtime.__version__} cannot compile {path.name!r}. It says: {cause}") from cause


def read(path: Path) -> Any:
    """The `openvino.Model` in a file.

    Raises:
        RuntimeFileError: the file cannot be opened.
        MissingExtraError: OpenVINO is not installed.
    """
    runtime: Any = require("openvino", "openvino", "Running an OpenVINO file")
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise RuntimeFileError(f"{path.name!r} has its weights in {weights.name!r}, which is not beside it. Copy both files.")
    try:
        return runtime.Core().read_model(str(path), str(weights))
    except Exception as cause:
        raise RuntimeFileError(
            f"OpenVINO {runtime.__version__} cannot open {path.name!r}: the file or its {weights.name} is truncated, not an "
            f"OpenVINO file, or needs what this version lacks. It says: {cause}"
        ) from cause
