"""A teacher's outputs on disk: written once, in any framework, and read by whichever trains the student.

A store is a folder: `outputs.npy` (examples, …, classes), memory-mapped when read; `keys.npy`, a fingerprint of 64 bits of
every example's inputs, in the same order; `store.json`. Both arrays grow by whole batches, so that a run that was killed goes
on where it was. Training asks by fingerprint: it may shuffle as it likes, and data that the teacher never saw is noticed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.data import Batches, leaves, primary
from whet.errors import DataError, ModelError, OutputError
from whet.files import replacing
from whet.numerics.losses_table import are_probabilities
from whet.progress import task

_HEADER = 256  # bytes before the values of a file that grows
_NOTE, _OUTPUTS, _KEYS = "store.json", "outputs.npy", "keys.npy"
_FORMAT = 1
_CLOSE = 1e-3  # how far a teacher's outputs may be from what it stored, as a part of their largest

Floats = npt.NDArray[Any]
Keys = npt.NDArray[np.uint64]


class StoredOutputs:
    """What a teacher returned for every example of some data, from a folder that `whet.teacher_outputs` wrote.

    It is a `teacher` like a model. `teacher` is its name, `len` the number of examples, `shape` that of one example's outputs.
    Where every row holds probabilities, their logarithms serve as logits (`is_normalized`).
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises `DataError` if there is no finished store in `folder`."""
        self.folder = Path(folder)
        note = _note(self.folder)
        if note is None or not note["finished"]:
            what = "is not finished" if note else "is no store of a teacher's outputs"
            raise DataError(f"{str(folder)!r} {what}. Run whet.teacher_outputs(teacher, data, store) with it; it goes on.")
        self.teacher, self.is_normalized = str(note["teacher"]), bool(note["normalized"])
        self._outputs: Floats = np.load(self.folder / _OUTPUTS, mmap_mode="r")
        keys: Keys = np.load(self.folder / _KEYS)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return int(self._outputs.shape[0])

    def __repr__(self) -> str:
        return f"StoredOutputs({str(self.folder)!r}): {len(self):,} examples {self.shape} of {self.teacher}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the outputs for one example."""
        return tuple(int(size) for size in self._outputs.shape[1:])

    def outputs(self, inputs: Any) -> Floats:
        """The teacher's outputs (n, …, classes) for a batch's inputs, float32.

        Raises:
            DataError: the teacher never saw one of them.
        """
        keys = fingerprints(inputs)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        unknown = int(np.sum(self._keys[place] != keys))
        if unknown:
            raise DataError(
                f"{unknown} of the batch's {len(keys)} examples are not among the {len(self):,} in {str(self.folder)!r}. Store "
                "the outputs for the very data that the student trains on: the same preprocessing and augmentation, sequences "
                "padded alike. What the teacher alone needs (other axes) belongs into teacher_outputs(transform=…)."
            )
        return np.asarray(self._outputs[self._order[place]], np.float32)


def fingerprints(inputs: Any) -> Keys:
    """64 bits for each example of a batch: two sums `Σ wᵢ·xᵢ mod 2⁶⁴` over its 32-bit words, of each the upper half.

    Each half of two different examples is the same with a probability of 2⁻³² (Dietzfelbinger 1996, multiply-shift). A dict
    is read in the order of its names, and of 64-bit integers the lower half: training loops sort the one and narrow the other.
    """
    words = []
    for leaf in leaves({name: inputs[name] for name in sorted(inputs)} if isinstance(inputs, Mapping) else inputs):
        array = np.ascontiguousarray(leaf)
        if array.dtype in (np.int64, np.uint64):
            array = array.astype(np.int32)
        raw = array.reshape(len(array), -1).view(np.uint8)
        padded = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4))) if raw.shape[1] % 4 else raw
        words.append(np.ascontiguousarray(padded).view(np.uint32))
    joined = np.concatenate(words, axis=1).astype(np.uint64) if len(words) > 1 else words[0].astype(np.uint64)
    weights = _mixed(2 * joined.shape[1]).reshape(-1, 2)
    high = (joined @ weights) >> np.uint64(32)
    return (high[:, 0] << np.uint64(32)) | high[:, 1]


def _mixed(count: int) -> Keys:
    """`count` fixed numbers of 64 random bits (SplitMix64; Steele et al. 2014)."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def write_outputs(
    predict: Callable[[Any], Any], name: str, data: Batches, folder: Path, *, overwrite: bool = False, progress: bool = True
) -> StoredOutputs:
    """Store `predict(inputs)` for every batch of `data`; what an interrupted run stored is kept, after a check.

    Raises:
        OutputError: `folder` holds something else, or cannot be written.
        DataError: what is stored is of other data, or of the same in another order.
        ModelError: it is another teacher's, or the teacher returns NaN.
    """
    note = _note(folder)
    if folder.exists() and note is None and any(folder.iterdir()):
        raise OutputError(f"{str(folder)!r} exists and is no store of a teacher's outputs. Choose another folder.")
    if overwrite and note is not None:
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tell(folder, {"teacher": name, "finished": False, "normalized": False})
        _fill(predict, data, folder, progress=progress)
        outputs = np.load(folder / _OUTPUTS, mmap_mode="r")
        _tell(folder, {"teacher": name, "finished": True, "normalized": are_probabilities(np.asarray(outputs[:4096]))})
    except OSError as cause:
        if isinstance(cause, OutputError):
            raise
        raise OutputError(f"Cannot write to {str(folder)!r}: {cause.strerror or cause}. Run it again: it goes on.") from cause
    return StoredOutputs(folder)


def _fill(predict: Callable[[Any], Any], data: Batches, folder: Path, *, progress: bool) -> None:
    """Go through all batches: check those that are stored, append the others."""
    files = [_Growing(folder / file) for file in (_OUTPUTS, _KEYS)]
    stored = min(file.rows for file in files)
    for file in files:
        file.cut(stored)
    at = 0
    with task("Teacher's outputs", len(data), enabled=progress) as shown:
        for index, (inputs, _) in enumerate(data):
            keys = fingerprints(inputs)
            known = min(max(stored - at, 0), len(keys))
            _check_order(files[1], keys[:known], at, data.what, index)
            if known < len(keys) or (index == 0 and known):
                found = _checked(predict(inputs), len(keys), index)
                if index == 0 and known:
                    _check_teacher(files[0].read(0, known), found[:known], folder)
                files[0].append(found[known:])
                files[1].append(keys[known:])
            at += len(keys)
            shown.advance(1)
    if at < stored:
        raise DataError(f"{str(folder)!r} holds {stored:,} examples, and the data has {at:,}: it is of other data.")


def _checked(outputs: Any, rows: int, index: int) -> Floats:
    found = np.ascontiguousarray(primary(outputs), np.float32)
    if found.shape[:1] != (rows,):
        raise ModelError(f"The teacher returned an array of shape {found.shape} for {rows} examples (batch {index}).")
    if not np.isfinite(found).all():
        raise ModelError(f"The teacher returned NaN or Inf on batch {index}. Check its weights with whet.inspect.")
    return found


def _check_order(stored: _Growing, keys: Keys, at: int, what: str, index: int) -> None:
    if len(keys) and not np.array_equal(stored.read(at, len(keys)), keys):
        raise DataError(
            f"Batch {index} of {what} is not what is stored there: the data changed, or comes in another order. Give the same "
            "data in the same order (a loader that does not shuffle) to go on, or pass overwrite=True to begin anew."
        )


def _check_teacher(stored: Floats, found: Floats, folder: Path) -> None:
    gap = float(np.abs(stored - found).max()) if stored.shape == found.shape else np.inf
    if gap > _CLOSE * max(float(np.abs(stored).max()), 1e-6):
        raise ModelError(
            f"The outputs in {str(folder)!r} are another teacher's: on the first batch they differ by {gap:.3g}. Choose "
            "another folder, or pass overwrite=True."
        )


class _Growing:
    """A .npy file that rows are appended to; its header always says how many are there."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._dtype, self._shape = np.dtype(np.float32), (0,)
        if path.exists() and path.stat().st_size >= _HEADER:
            array = np.load(path, mmap_mode="r") if path.stat().st_size > _HEADER else np.load(path)
            self._dtype, self._shape = array.dtype, array.shape[1:]
            self.rows = int(array.shape[0])

    def read(self, start: int, count: int) -> Floats:
        """`count` rows from `start` on."""
        return np.array(np.load(self.path, mmap_mode="r")[start : start + count])

    def cut(self, rows: int) -> None:
        """Keep the first `rows`."""
        if self.path.exists():
            self.rows = rows
            if not rows:
                self.path.unlink()
                return
            with self.path.open("r+b") as stream:
                stream.truncate(_HEADER + rows * self._size())
                self._head(stream)

    def append(self, values: Floats) -> None:
        """Rows of one shape and dtype, on disk when this returns; the header follows them."""
        if not self.rows:
            self._dtype, self._shape = values.dtype, values.shape[1:]
        elif values.shape[1:] != self._shape:
            raise DataError(
                f"Outputs of shape {values.shape[1:]} an example follow ones of {self._shape}: pad all sequences to one length."
            )
        with self.path.open("r+b" if self.rows else "wb") as stream:
            stream.seek(_HEADER + self.rows * self._size())
            stream.write(np.ascontiguousarray(values).tobytes())
            stream.flush()
            self.rows += len(values)
            self._head(stream)

    def _size(self) -> int:
        return int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize

    def _head(self, stream: Any) -> None:
        shape = (self.rows, *(int(size) for size in self._shape))
        text = repr({"descr": self._dtype.str, "fortran_order": False, "shape": shape}).encode("ascii")
        stream.seek(0)
        stream.write(b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + text.ljust(_HEADER - 11) + b"\n")


def _note(folder: Path) -> dict[str, Any] | None:
    path = folder / _NOTE
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    is_ours = isinstance(note, dict) and note.get("format") == _FORMAT and {"teacher", "finished", "normalized"} <= note.keys()
    return note if is_ours else None


def _tell(folder: Path, note: dict[str, Any]) -> None:
    with replacing(folder / _NOTE, overwrite=True) as path:
        path.write_text(json.dumps({"format": _FORMAT, **note}, indent=1), encoding="utf-8")
