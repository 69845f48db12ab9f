"""ONNX files in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.errors import RuntimeFileError, require
from whet.runtimes.base import Array, Session, Slot

PROVIDERS = ("CPUExecutionProvider",)
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
} | {f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_SILENT = 4  # log nothing below fatal: what fails is raised


class OnnxSession(Session):
    """An ONNX file, every graph optimization on, as ONNX Runtime does by default."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int) -> None:
        """Open `path`.

        Raises:
            RuntimeFileError: the file is truncated, foreign, or asks for what this ONNX Runtime lacks.
        """
        self.file, self.threads = path.name, threads
        self._session = create(path, threads)
        runtime: Any = require("onnxruntime", "onnx", "Running an ONNX file")
        self.version = str(runtime.__version__)
        self.inputs = tuple(self._slot(value) for value in self._session.get_inputs())
        self.outputs = tuple(self._slot(value) for value in self._session.get_outputs())
        self._binding = self._session.io_binding()
        self._placed: Sequence[Array] = ()

    def _slot(self, value: Any) -> Slot:
        if value.type not in _TYPES:
            raise RuntimeFileError(
                f"{value.name!r} of {self.file!r} is a {value.type}; inputs and outputs must be one of: {', '.join(_TYPES)}."
            )
        shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        return Slot(value.name, shape, _TYPES[value.type])

    def _place(self, arrays: Sequence[Array]) -> None:
        self._binding = self._session.io_binding()
        self._placed = arrays  # the binding may point into them
        for slot, array in zip(self.inputs, arrays, strict=True):
            self._binding.bind_cpu_input(slot.name, array)
        for slot in self.outputs:
            self._binding.bind_output(slot.name, "cpu")

    def invoke(self) -> None:
        """Compute once on what was placed.

        Raises:
            RuntimeFileError: ONNX Runtime fails, with its own words.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as cause:
            raise RuntimeFileError(f"ONNX Runtime could not run {self.file!r}: {cause}") from cause

    def _fetch(self) -> Sequence[Array]:
        outputs: Sequence[Array] = self._binding.copy_outputs_to_cpu()
        return outputs


def create(path: Path, threads: int, optimized: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession`; with `optimized`, the graph as it will run is written there.

    Raises:
        RuntimeFileError: the file cannot be opened.
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime: Any = require("onnxruntime", "onnx", "Running an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Threads that keep spinning after a run would take the core from the session timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        if path.with_name(f"{path.name}.data").is_file():  # too large for one file, and so is the optimized graph
            entry = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(entry, f"{optimized.name}.data")
    try:
        return runtime.InferenceSession(str(path), options, providers=list(PROVIDERS))
    except Exception as cause:
        raise RuntimeFileError(
            f"ONNX Runtime {runtime.__version__} cannot open {path.name!r}: the file is truncated, not an ONNX file, or "
            f"needs what this version lacks. It says: {cause}"
        ) from cause
