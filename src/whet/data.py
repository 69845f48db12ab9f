"""Batches, whatever they come in.

A batch is inputs, `(inputs, targets)`, or a dict of inputs (whose "labels" entry, if any, are the targets). Data is an
iterable of batches (a DataLoader, a tf.data.Dataset, a PyDataset, a list), or whole arrays: one array, a tuple
`(inputs, targets)` of arrays, or a dict of arrays, which are cut into batches here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import DataError

BATCH = 64
LABELS = "labels"


class Batches:
    """Data as batches of NumPy arrays that can be read any number of times.

    Iterating yields `(inputs, targets)`: inputs an array, a tuple or a dict of arrays; targets an array, a structure of
    arrays, or None. Every array is checked to be finite. `shuffled(seed)` reads whole arrays in a new order; data that
    arrives in batches keeps its own order (its loader shuffles).
    """

    def __init__(self, data: Any, what: str = "data", *, batch: int = BATCH) -> None:
        """`what` names the data in errors ("train", "calibration"); `batch` is the size that whole arrays are cut into.

        Raises:
            DataError: None, nothing in it, no end to it, arrays of different lengths, or something that is no data.
        """
        self._data: Any
        if isinstance(data, Batches):
            data, batch = data._data, data._batch
        if data is None:
            raise DataError(f"{what} is needed here, got None. Pass an iterable of batches or a tuple of arrays.")
        self.what, self._batch, self._is_arrays = what, batch, _is_arrays(data)
        if self._is_arrays:
            _check_lengths(data, what)
            data = _map(data, lambda array: _array(array, what))
        else:
            _refuse_unusable(data, what)
        if isinstance(data, Iterator):
            # A generator can be read once; what it yields is kept, so that every pass sees the same batches.
            data = list(data)
        if not self._is_arrays and _known_length(data) == 0:
            raise DataError(f"{what} is empty: it yielded no batch. If it is a generator, it may have been read before.")
        self._data = data

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._read(None)

    def shuffled(self, seed: int) -> Iterator[tuple[Any, Any]]:
        """One pass in an order drawn from `seed`, where the data came as whole arrays."""
        return self._read(np.random.default_rng(seed))

    def some(self, count: int, seed: int) -> list[tuple[Any, Any]]:
        """At most `count` batches of the shuffled data.

        Raises:
            DataError: there is none.
        """
        found = list(islice(self.shuffled(seed), count))
        if not found:
            raise DataError(f"{self.what} held no batches.")
        return found

    @property
    def is_fixed(self) -> bool:
        """Whether every pass sees the same batches, as far as can be told: whole arrays, or a list."""
        return self._is_arrays or isinstance(self._data, list | tuple)

    @property
    def source(self) -> Any:
        """The data as they were given."""
        return self._data

    def __len__(self) -> int:
        """The number of batches; read once to find out where the data does not say."""
        if self._is_arrays:
            return -(-_length(self._data) // self._batch)
        known = _known_length(self._data)
        return known if known is not None else sum(1 for _ in self._raw())

    def first(self) -> tuple[Any, Any]:
        """The first batch."""
        return next(iter(self))

    def _raw(self) -> Iterator[Any]:
        if hasattr(self._data, "__iter__"):
            return iter(self._data)
        return (self._data[i] for i in range(len(self._data)))

    def _read(self, rng: np.random.Generator | None) -> Iterator[tuple[Any, Any]]:
        count = 0
        for index, batch in enumerate(self._cut(rng) if self._is_arrays else self._raw()):
            inputs, targets = split(batch)
            where = f"{self.what}, batch {index}"
            count += 1
            yield to_numpy(inputs, f"inputs of {where}"), to_numpy(targets, f"targets of {where}")
        if count == 0:
            raise DataError(f"{self.what} is empty: it yielded no batch. If it is a generator, it may have been read before.")

    def _cut(self, rng: np.random.Generator | None) -> Iterator[Any]:
        n = _length(self._data)
        order = np.arange(n) if rng is None else rng.permutation(n)
        for start in range(0, n, self._batch):
            rows = order[start : start + self._batch]
            yield _map(self._data, lambda array, rows=rows: array[rows])


def split(batch: Any) -> tuple[Any, Any]:
    """`(inputs, targets)` of a batch; targets is None where it has none.

    Raises:
        DataError: a sequence that is neither.
    """
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key != LABELS}
        return inputs, batch.get(LABELS)
    if isinstance(batch, tuple | list):
        if len(batch) == 2:
            return split(batch[0])[0] if isinstance(batch[0], Mapping) else batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise DataError(
            f"A batch is inputs, (inputs, targets) or a dict of inputs, got a sequence of {len(batch)}. "
            "Several inputs with targets are written ((a, b), targets); sample weights are not taken beside them: put them "
            "among the targets, (inputs, {'label': y, 'weight': w}), and read them in Train(loss=…)."
        )
    return batch, None


def to_numpy(value: Any, where: str) -> Any:
    """Arrays of any framework as NumPy arrays, in the same structure; floats become float32 unless they are 16-bit.

    Raises:
        DataError: a value that is no array, or one with NaN or Inf, named by `where`.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: to_numpy(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, tuple) or (isinstance(value, list) and value and hasattr(value[0], "shape") and len(value[0].shape)):
        return tuple(to_numpy(item, f"{where}[{i}]") for i, item in enumerate(value))
    array = _array(value, where)
    if array.dtype.kind not in "fiubc":
        raise DataError(f"{where} must be numeric arrays of one shape, got {type(value).__name__} of {array.dtype}.")
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            array = array.astype(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise DataError(f"{where} holds {array[bad]} at index {bad}. Remove or repair such examples.")
    return array


def rows(value: Any) -> int:
    """The number of examples in a batch's inputs or outputs."""
    if isinstance(value, Mapping):
        return rows(next(iter(value.values())))
    if isinstance(value, tuple | list):
        return rows(value[0])
    return int(value.shape[0]) if getattr(value, "shape", ()) else 1


def concatenate(parts: Sequence[Any]) -> Any:
    """Batches of outputs or targets as one, in the same structure; None where they are.

    Raises:
        DataError: there are none, or their shapes differ in more than the first dimension.
    """
    if not parts:
        raise DataError("There is no batch to join: the data was empty.")
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(concatenate([part[i] for part in parts]) for i in range(len(first)))
    arrays = [np.atleast_1d(part) for part in parts]
    if len({array.shape[1:] for array in arrays}) > 1:
        shapes = sorted({array.shape[1:] for array in arrays})
        raise DataError(
            f"Batches cannot be joined: their examples have different shapes, {shapes[0]} and {shapes[1]}. "
            "Pad them to one shape."
        )
    return np.concatenate(arrays)


def leaves(value: Any) -> list[Any]:
    """The arrays in a structure of dicts, tuples and lists, in its order."""
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def primary(outputs: Any) -> Any:
    """What losses and default metrics read of a model's outputs: the only one, the one named `logits`, or the first."""
    if isinstance(outputs, Mapping):
        return primary(outputs["logits"] if outputs.get("logits") is not None else next(iter(outputs.values()), None))
    if isinstance(outputs, tuple | list):
        return primary(outputs[0]) if outputs else None
    return outputs


def _array(value: Any, where: str) -> npt.NDArray[Any]:
    """One array of any framework, on this machine's memory; bfloat16, which NumPy lacks, as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise DataError(f"{where} must be numeric arrays of one shape, got a {type(value).__name__} ({cause}).") from cause
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _refuse_unusable(data: Any, what: str) -> None:
    """Raise `DataError` for what would be misread batch by batch, or never end."""
    if isinstance(data, str | bytes) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(f"{what} must be an iterable of batches or a tuple of arrays, got a {type(data).__name__}.")
    if isinstance(data, Mapping) and data:
        names = [key for key, value in data.items() if not hasattr(value, "shape")]
        raise DataError(f"{what} is a dict, whose values must be arrays; {names[0]!r} is a {type(data[names[0]]).__name__}.")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.utils.data.Dataset) and not hasattr(data, "__iter__"):
        raise DataError(
            f"{what} is a {type(data).__name__}, which yields single examples. "
            "Wrap it: torch.utils.data.DataLoader(dataset, batch_size=64)."
        )
    if hasattr(data, "cardinality") and int(data.cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        raise DataError(f"{what} never ends. Leave out .repeat(), or end it with .take(n).")
    if isinstance(data, list) and len({len(item.shape) for item in data if hasattr(item, "shape")}) > 1:
        raise DataError(
            f"{what} is a list, which holds batches, and its arrays have different numbers of dimensions. "
            "Whole arrays are written as a tuple: (inputs, targets)."
        )


def _known_length(data: Any) -> int | None:
    """The number of batches where the data says so: a tf.data.Dataset or an IterableDataset's loader may not."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _is_arrays(data: Any) -> bool:
    if isinstance(data, Mapping):
        return len(data) > 0 and all(hasattr(value, "shape") for value in data.values())
    if isinstance(data, tuple):
        return len(data) > 0 and all(hasattr(value, "shape") or isinstance(value, Mapping | tuple) for value in data)
    return hasattr(data, "shape") and hasattr(data, "dtype")


def _map(data: Any, function: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _map(value, function) for key, value in data.items()}
    if isinstance(data, tuple):
        return tuple(_map(value, function) for value in data)
    return function(data)


def _length(data: Any) -> int:
    return int(leaves(data)[0].shape[0])


def _check_lengths(data: Any, what: str) -> None:
    shapes = [tuple(leaf.shape) for leaf in leaves(data)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise DataError(f"The arrays of {what} must have one first dimension, the examples; got shapes {shapes}.")
    if shapes[0][0] == 0:
        raise DataError(f"{what} is empty: its arrays have no rows.")
