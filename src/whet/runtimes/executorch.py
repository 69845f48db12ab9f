"""ExecuTorch programs (.pte) in ExecuTorch's own runtime, on the CPU, with the XNNPACK kernels where they are delegated.

ExecuTorch takes no number of threads: XNNPACK uses the process's cores. Pin the process (taskset) to compare with others;
the record says so, and CPU time over wall time is part of every latency.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from whet.data import concatenate
from whet.errors import RuntimeFileError, require
from whet.runtimes.base import Array, Session, Slot, arrange

IDENTIFIER = b"ET12"
SIGNATURE = "whet_signature"  # a method that returns names and free axes as JSON; other exporters' files have none
_THREADS = "not settable; XNNPACK uses the cores the process may use"
_BOUNDED = 1  # TensorShapeDynamism.DYNAMIC_BOUND: the sizes given are the largest


class ExecuTorchSession(Session):
    """The method `forward` of a .pte file.

    A dynamic axis has a largest size, for which the file's memory is planned; larger batches are run in pieces.
    """

    name = "executorch"

    def __init__(self, path: Path, threads: int) -> None:
        """Open `path`.

        Raises:
            RuntimeFileError: the file is truncated, foreign, or asks for kernels or backends that this ExecuTorch lacks.
            MissingExtraError: ExecuTorch is not installed.
        """
        self.file, self.threads, self.version = path.name, threads, _version()
        plans = {plan.name: plan for plan in read_program(path).execution_plan}
        if "forward" not in plans:
            raise RuntimeFileError(f"{path.name!r} has no method 'forward'; it has {', '.join(plans)}.")
        package: Any = require("executorch.runtime", "executorch", "Running a .pte file")
        self._torch: Any = require("torch", "torch", "Running a .pte file")
        try:
            with silent():
                require("executorch.kernels.quantized", "executorch", "Running a .pte file")  # kernels for quantizers
                self._program = package.Runtime.get().load_program(path)
                self._method = self._program.load_method("forward")
        except (RuntimeError, ValueError) as cause:
            from whet.torch.executorch_export import missing_kernels

            lacking = missing_kernels(path)
            why = f"this version lacks the kernels {', '.join(lacking)}." if lacking else f"it is damaged. It says: {cause}"
            raise RuntimeFileError(f"ExecuTorch {self.version} cannot open {path.name!r}: {why}") from cause
        self._delegates = [delegate.id for delegate in plans["forward"].delegates]
        self._read_slots(plans)
        self._placed: list[Any] = []
        self._outputs: Sequence[Any] = ()

    def _read_slots(self, plans: dict[str, Any]) -> None:
        plan = plans["forward"]
        given = [plan.values[index].val for index in plan.inputs]
        returned = [plan.values[index].val for index in plan.outputs]
        told = _signature(plans)
        names = told.get("inputs") or [f"input_{i}" for i in range(len(given))]
        free = told.get("free") or [list(range(len(tensor.sizes))) if _is_dynamic(tensor) else [] for tensor in given]
        outputs = told.get("outputs") or [f"output_{i}" for i in range(len(returned))]
        self.inputs = tuple(_slot(*item) for item in zip(names, given, free, strict=True))
        bound = [list(range(len(tensor.sizes))) if _is_dynamic(tensor) else [] for tensor in returned]  # which, it does not say
        self.outputs = tuple(_slot(*item) for item in zip(outputs, returned, bound, strict=True))
        bounds = [int(tensor.sizes[0]) for tensor, axes in zip(given, free, strict=True) if 0 in axes]
        self.largest_batch: int | None = min(bounds) if bounds else None

    @property
    def runtime(self) -> dict[str, str]:
        """The runtime's record, with the backends that parts of the file are delegated to."""
        counts = {name: self._delegates.count(name) for name in dict.fromkeys(self._delegates)}
        kernels = ", ".join(f"{name} ({count} part{'s' if count > 1 else ''})" for name, count in counts.items())
        return {"name": self.name, "version": self.version, "kernels": kernels or "portable", "threads": _THREADS}

    def run(self, inputs: Any) -> Any:
        """The outputs for one batch of any size; see `Session.run`."""
        arrays = arrange(inputs, self.inputs, self.file)
        rows = min((array.shape[0] for array in arrays if array.ndim), default=0)
        most = self.largest_batch
        if most is None or rows <= most:
            return super().run(tuple(arrays))
        return concatenate([super(ExecuTorchSession, self).run(tuple(part)) for part in _pieces(arrays, rows, most)])

    def _place(self, arrays: Sequence[Array]) -> None:
        rows = [array.shape[0] for array in arrays if array.ndim]
        if self.largest_batch is not None and max(rows, default=0) > self.largest_batch:
            raise RuntimeFileError(
                f"{self.file!r} was exported for batches of at most {self.largest_batch}, got {max(rows)}. "
                "Export with dynamic={input: {0: (name, largest)}} for more."
            )
        self._placed = [self._torch.from_numpy(np.array(array)) for array in arrays]

    def invoke(self) -> None:
        """Compute once on what was placed.

        Raises:
            RuntimeFileError: ExecuTorch fails, with its own words.
        """
        try:
            self._outputs = self._method.execute(self._placed)
        except (RuntimeError, ValueError) as cause:
            shapes = [tuple(tensor.shape) for tensor in self._placed]
            raise RuntimeFileError(f"ExecuTorch could not run {self.file!r} on inputs of shapes {shapes}: {cause}") from cause

    def _fetch(self) -> Sequence[Array]:
        return [np.array(item.detach().numpy()) if hasattr(item, "numpy") else np.asarray(item) for item in self._outputs]


def read_program(path: Path) -> Any:
    """The program of a .pte file as ExecuTorch's own dataclasses, its delegates' data restored; `path` exists.

    Raises:
        RuntimeFileError: not a .pte file, truncated or damaged.
        MissingExtraError: ExecuTorch is not installed.
    """
    return read_file(path).program


def read_file(path: Path) -> Any:
    """As `read_program`, with the named data (weights) beside the program."""
    with path.open("rb") as stream:
        found = stream.read(8)[4:]
    if found != IDENTIFIER:
        raise RuntimeFileError(
            f"{path.name!r} is not a .pte file, or is truncated: bytes 4 to 8 must be {IDENTIFIER!r}, got {found!r}."
        )
    with silent():
        package: Any = require("executorch.exir._serialize._program", "executorch", "Running a .pte file")
        try:
            return package.deserialize_pte_binary(path.read_bytes())
        except Exception as cause:  # the parser checks nothing: what a damaged file makes it raise is open
            raise RuntimeFileError(
                f"ExecuTorch {_version()} cannot read {path.name!r}: the file is truncated or damaged "
                f"({type(cause).__name__}: {cause})."
            ) from cause


def _signature(plans: dict[str, Any]) -> dict[str, Any]:
    if SIGNATURE not in plans:
        return {}
    plan = plans[SIGNATURE]
    told: dict[str, Any] = json.loads(plan.values[plan.outputs[0]].val.string_val)
    return told


def _is_dynamic(tensor: Any) -> bool:
    return int(tensor.shape_dynamism) == _BOUNDED


def _slot(name: str, tensor: Any, free: Sequence[int]) -> Slot:
    shape = tuple(None if axis in free else int(size) for axis, size in enumerate(tensor.sizes))
    return Slot(name, shape, dtype_name(tensor))


def dtype_name(tensor: Any) -> str:
    """The element type of a program's tensor."""
    name: str = tensor.scalar_type.name
    return _DTYPES.get(name, name.lower())


def _pieces(arrays: Sequence[Array], rows: int, most: int) -> Iterator[list[Array]]:
    for start in range(0, rows, most):
        yield [array[start : start + most] if array.ndim and array.shape[0] == rows else array for array in arrays]


_DTYPES = {
    "BYTE": "uint8",
    "CHAR": "int8",
    "SHORT": "int16",
    "INT": "int32",
    "LONG": "int64",
    "HALF": "float16",
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "BOOL": "bool",
}


def _version() -> str:
    try:
        return version("executorch")
    except PackageNotFoundError:
        return "unknown"


@contextmanager
def silent() -> Iterator[None]:
    """Both output streams closed to native code and to loggers: ExecuTorch logs there, and raises what matters."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
        logging.disable(before)
