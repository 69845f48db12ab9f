"""What every runtime's session is: a file that takes batches and returns outputs.

A session takes real values. Where a file's own inputs or outputs are quantized, they are scaled on the way in and out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.data import concatenate
from whet.errors import RuntimeFileError

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Slot:
    """One input or output of a file. shape: None where a dimension is dynamic.

    quantization: `(scale, zero_point)` where the file itself takes or gives integers that stand for real values.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    quantization: tuple[float, int] | None = None

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.name!r} ({sizes}) {self.dtype}"


class Session(ABC):
    """A file opened by its runtime. Not safe for use from several threads at once.

    file: its name. name, version: the runtime's. threads: what the runtime was given. inputs, outputs: its `Slot`s.
    """

    file: str
    name: str
    version: str
    threads: int
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]

    @property
    def runtime(self) -> dict[str, str]:
        """The runtime's record: `{"name", "version"}` and what else says which code ran."""
        return {"name": self.name, "version": self.version}

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the file is bound to; None where it takes any."""
        sizes = {slot.shape[0] if slot.shape else None for slot in self.inputs}
        return sizes.pop() if len(sizes) == 1 else None

    def run(self, inputs: Any) -> Any:
        """The outputs for one batch of `inputs` (an array, a tuple, a dict by name): an array, or a tuple if there are several.

        A file of a fixed batch size is run as often as needed, its last batch padded with the last example.

        Raises:
            RuntimeFileError: wrong names, shapes or types of inputs, or the runtime fails.
        """
        arrays = arrange(inputs, self.inputs, self.file)
        size = self.fixed_batch
        if size is None or all(array.shape[0] == size for array in arrays):
            return self._run(arrays)
        rows = min(array.shape[0] for array in arrays)
        parts = []
        for start in range(0, rows, size):
            kept = min(size, rows - start)
            indices = np.minimum(np.arange(start, start + size), rows - 1)
            part = self._run([array[indices] for array in arrays])
            parts.append(tuple(item[:kept] for item in part) if isinstance(part, tuple) else part[:kept])
        return concatenate(parts)

    def prepare(self, inputs: Any) -> None:
        """Put one batch into the runtime's own inputs, so that `invoke` alone can be timed.

        Raises:
            RuntimeFileError: as `run`; also a batch size other than the file's own.
        """
        arrays = arrange(inputs, self.inputs, self.file)
        size = self.fixed_batch
        if size is not None and any(array.shape[0] != size for array in arrays):
            raise RuntimeFileError(f"{self.file!r} takes batches of {size} only, got {arrays[0].shape[0]} examples.")
        self._place(arrays)

    def _run(self, arrays: Sequence[Array]) -> Any:
        self._place(arrays)
        self.invoke()
        outputs = tuple(dequantize(array, slot) for array, slot in zip(self._fetch(), self.outputs, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    @abstractmethod
    def _place(self, arrays: Sequence[Array]) -> None:
        """Give the runtime its inputs, in the order of `inputs`."""

    @abstractmethod
    def invoke(self) -> None:
        """Compute once on what was placed."""

    @abstractmethod
    def _fetch(self) -> Sequence[Array]:
        """Copies of the outputs of the last `invoke`, in the order of `outputs`."""


def arrange(inputs: Any, slots: tuple[Slot, ...], file: str) -> list[Array]:
    """`inputs` as one array per slot, of the slot's type.

    Raises:
        RuntimeFileError: wrong names, number, shapes or types, saying what was expected and got.
    """
    expected = ", ".join(str(slot) for slot in slots)
    if isinstance(inputs, Mapping):
        names = [slot.name for slot in slots]
        if set(inputs) != set(names):
            raise RuntimeFileError(f"{file!r} takes the inputs {expected}; got the names {sorted(map(str, inputs))}.")
        arrays = [inputs[name] for name in names]
    else:
        arrays = list(inputs) if isinstance(inputs, tuple | list) else [inputs]
    if len(arrays) != len(slots):
        raise RuntimeFileError(f"{file!r} takes {len(slots)} inputs: {expected}; got {len(arrays)}.")
    placed = [_fit(np.asarray(array), slot, file) for array, slot in zip(arrays, slots, strict=True)]
    rows = {array.shape[0] for array in placed if array.ndim}
    if len(rows) > 1:
        raise RuntimeFileError(f"The inputs of {file!r} must have as many examples each; got {sorted(rows)}.")
    return placed


def _fit(array: Array, slot: Slot, file: str) -> Array:
    shape, wanted = array.shape, slot.shape
    # The first size is free even where the file fixes it: the session then cuts the batch.
    fits = len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape[1:], wanted[1:], strict=True))
    if not fits:
        hint = _axes_hint(shape, wanted)
        raise RuntimeFileError(f"The input of {file!r} must be {slot}, got an array of shape {shape} {array.dtype}.{hint}")
    if slot.quantization is not None:
        scale, zero_point = slot.quantization
        limits = np.iinfo(slot.dtype)
        codes = np.rint(np.asarray(array, np.float64) / scale) + zero_point
        clipped: Array = np.clip(codes, limits.min, limits.max)
        return clipped.astype(slot.dtype)
    cast = _cast(array, np.dtype(slot.dtype))
    if cast is None:
        raise RuntimeFileError(
            f"The input of {file!r} must be {slot}, got {array.dtype}, whose values do not fit that type without loss."
        )
    return np.ascontiguousarray(cast)


def _axes_hint(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> str:
    """A sentence where moving the channels to the other end would make `shape` fit."""
    if len(shape) != len(wanted) or len(shape) < 3:
        return ""
    for order, where in (((0, len(shape) - 1, *range(1, len(shape) - 1)), "first"), ((0, *range(2, len(shape)), 1), "last")):
        moved = tuple(shape[axis] for axis in order)
        if all(w in (None, s) for s, w in zip(moved[1:], wanted[1:], strict=True)):
            return f" It takes channels {where}: transpose the data to {order}."
    return ""


def _cast(array: Array, dtype: np.dtype[Any]) -> Array | None:
    """`array` as `dtype`, or None where that would change its meaning: a float for an integer, an overflow."""
    if array.dtype == dtype:
        return array
    if array.dtype.kind == "f" and dtype.kind != "f":
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if array.dtype.kind == "f":  # a narrower float is the file's own rounding of its input
        return cast if np.array_equal(np.isfinite(cast), np.isfinite(array)) else None
    return cast if np.array_equal(cast.astype(array.dtype), array) else None


def dequantize(array: Array, slot: Slot) -> Array:
    """The real values of an output."""
    if slot.quantization is None:
        return array
    scale, zero_point = slot.quantization
    values: Array = (array.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
    return values
