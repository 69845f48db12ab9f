"""LiteRT (.tflite) files in the LiteRT interpreter, on the CPU, with the XNNPACK kernels where they apply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import RuntimeFileError, require
from whet.formats.converters import quiet
from whet.runtimes.base import Array, Session, Slot

IDENTIFIER = b"TFL3"
_POSITIONAL = re.compile(r"(?:args|inputs|output|outputs)_(\d+)")


class LiteRTSession(Session):
    """A .tflite file. Inputs bear the names of the file's signature where it has one."""

    name = "litert"

    def __init__(self, path: Path, threads: int) -> None:
        """Open `path`.

        Raises:
            RuntimeFileError: the file is truncated, foreign, or asks for operators that this LiteRT lacks.
        """
        self.file, self.threads = path.name, threads
        self._interpreter = create(path, threads)
        self.version = _version()
        names = self._interpreter.get_signature_list()
        signature = self._interpreter.get_signature_runner(next(iter(names))) if len(names) == 1 else None
        inputs = self._interpreter.get_input_details()
        outputs = self._interpreter.get_output_details()
        self._inputs = _named(inputs, signature.get_input_details() if signature else {})
        self._outputs = _named(outputs, signature.get_output_details() if signature else {})
        self.inputs = tuple(_slot(name, details) for name, details in self._inputs)
        self.outputs = tuple(_slot(name, details) for name, details in self._outputs)
        self._shapes: list[tuple[int, ...]] = []

    @property
    def runtime(self) -> dict[str, str]:
        """The runtime's record, with the kernels that the file's operators run in."""
        operators = [details["op_name"] for details in self._interpreter._get_ops_details()]
        parts = operators.count("DELEGATE")
        kernels = f"XNNPACK ({parts} part{'s' if parts > 1 else ''})" if parts else "built-in"
        return {"name": self.name, "version": self.version, "kernels": kernels}

    def _place(self, arrays: Sequence[Array]) -> None:
        shapes = [array.shape for array in arrays]
        try:
            if shapes != self._shapes:
                with quiet():
                    for (_, details), shape in zip(self._inputs, shapes, strict=True):
                        if tuple(details["shape"]) != shape or self._shapes:
                            self._interpreter.resize_tensor_input(details["index"], shape)
                    self._interpreter.allocate_tensors()
                self._shapes = shapes
            for (_, details), array in zip(self._inputs, arrays, strict=True):
                self._interpreter.set_tensor(details["index"], array)
        except (RuntimeError, ValueError) as cause:
            self._shapes = []
            raise RuntimeFileError(f"LiteRT could not take inputs of shapes {shapes} for {self.file!r}: {cause}") from cause

    def invoke(self) -> None:
        """Compute once on what was placed.

        Raises:
            RuntimeFileError: LiteRT fails, with its own words.
        """
        try:
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as cause:
            raise RuntimeFileError(f"LiteRT could not run {self.file!r}: {cause}") from cause

    def _fetch(self) -> Sequence[Array]:
        return [self._interpreter.get_tensor(details["index"]) for _, details in self._outputs]


def create(path: Path, threads: int) -> Any:
    """An `ai_edge_litert.interpreter.Interpreter` with its tensors allocated at the file's own shapes.

    Raises:
        RuntimeFileError: the file cannot be opened.
        MissingExtraError: LiteRT is not installed.
    """
    package: Any = require("ai_edge_litert.interpreter", "litert", "Running a .tflite file")
    with path.open("rb") as stream:
        found = stream.read(8)[4:]
    if found != IDENTIFIER:
        raise RuntimeFileError(
            f"{path.name!r} is not a .tflite file, or is truncated: bytes 4 to 8 must be {IDENTIFIER!r}, got {found!r}."
        )
    try:
        with quiet():
            interpreter = package.Interpreter(str(path), num_threads=threads)
            interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as cause:
        raise RuntimeFileError(
            f"LiteRT {_version()} cannot open {path.name!r}: the file is truncated, damaged, or needs operators that this "
            f"version lacks. It says: {cause}"
        ) from cause
    return interpreter


def _version() -> str:
    try:
        return version("ai-edge-litert")
    except PackageNotFoundError:
        return "unknown"


def _named(details: Sequence[dict[str, Any]], signature: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """`(name, details)` of inputs or outputs; names that count positions (`output_1`) put them in that order."""
    names = {item["index"]: name for name, item in signature.items()}
    named = [(names.get(item["index"], _plain(item["name"])), item) for item in details]
    positions = [_POSITIONAL.fullmatch(name) for name, _ in named]
    if all(positions):
        numbers = [int(match[1]) for match in positions if match]
        return [named[i] for i in np.argsort(numbers, kind="stable")]
    return named


def _plain(name: str) -> str:
    return re.sub(r":\d+$", "", name.removeprefix("serving_default_"))


def _slot(name: str, details: dict[str, Any]) -> Slot:
    signature = details["shape_signature"] if len(details["shape_signature"]) else details["shape"]
    shape = tuple(None if size < 0 else int(size) for size in signature)
    dtype = np.dtype(details["dtype"])
    scale, zero_point = details["quantization"]
    quantized = dtype.kind in "iu" and scale > 0
    return Slot(name, shape, dtype.name, (float(scale), int(zero_point)) if quantized else None)
