"""Where a training stands between two epochs, in a file: killed at any moment, the same call goes on from the last one.

The file is safetensors: every array as its bytes, and in the metadata one JSON text with all else, the types and the shapes.
Nothing in it is executed or unpickled. It replaces the one before in one move of the file system: what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from whet.data import Batches, leaves
from whet.errors import OutputError
from whet.files import replacing

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file, and which training it belongs to: `belongs` holds plain values by what a reader would call them."""

    path: Path
    belongs: dict[str, Any]

    def write(self, state: Any) -> None:
        """Put `state`, a tree of dicts, lists, plain values and NumPy arrays, in the place of what is there.

        Raises:
            OutputError: the folder cannot be written, or its disk is full; the file before is unchanged.
        """
        arrays: dict[str, Any] = {}
        plain = _packed({"state": state, "belongs": self.belongs}, arrays)
        with replacing(self.path, overwrite=True) as scratch:
            save_file(arrays, scratch, {"whet": json.dumps({"format": FORMAT, **plain})})

    def read(self) -> Any:
        """The state that was written last; None where there is none.

        Raises:
            OutputError: the file belongs to another training, or is no checkpoint.
        """
        for left in self.path.parent.glob(f".{self.path.name}.*"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "numpy") as file:
                plain = json.loads(file.metadata()["whet"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}
            if plain["format"] != FORMAT:
                raise OutputError(f"{str(self.path)!r} has the format {plain['format']}; this Whet reads {FORMAT}. Remove it.")
            found = _unpacked({"state": plain["state"], "belongs": plain["belongs"]}, arrays)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as cause:
            raise OutputError(
                f"{str(self.path)!r} is no checkpoint that can be read ({type(cause).__name__}: {cause}). Remove it to begin "
                "again, or name another folder."
            ) from cause
        self._check(found["belongs"])
        return found["state"]

    def _check(self, found: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(self.belongs))
        differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if differing:
            name = differing[0]
            raise OutputError(
                f"{str(self.path)!r} is the checkpoint of another training: its {name} is {_short(found.get(name))}, and here "
                f"it is {_short(wanted.get(name))}. Name another folder, or remove the file to begin again."
            )


def random_state() -> dict[str, Any]:
    """Where the global random numbers of Python and NumPy stand."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, np.asarray(words, np.uint64), gauss],
        "numpy": [str(kind), np.asarray(keys), int(position), int(has_gauss), float(cached)],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(int(word) for word in words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys, position, has_gauss, cached))


def digest(arrays: Mapping[str, Any]) -> str:
    """A short fingerprint of named NumPy arrays."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype.name} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes())
    return found.hexdigest()[:16]


def data_digest(data: Batches) -> str:
    """What tells two sets of data apart: the number of batches and, where every pass sees the same ones, the first of them."""
    if not data.is_fixed:
        return f"{len(data)} batches"
    found = {str(index): array for index, array in enumerate(leaves(data.first())) if array is not None}
    return f"{len(data)} batches, the first {digest(found)}"


def _packed(tree: Any, arrays: dict[str, Any]) -> Any:
    """`tree` as JSON has it; its arrays go to `arrays`, as bytes: safetensors knows fewer types than NumPy and its kin."""
    if isinstance(tree, Mapping):
        return {str(key): _packed(item, arrays) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [_packed(item, arrays) for item in tree]
    if isinstance(tree, np.ndarray | np.generic):
        array, name = np.asarray(tree), str(len(arrays))
        arrays[name] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return {"$array": [name, array.dtype.name, list(array.shape)]}
    return tree


def _unpacked(tree: Any, arrays: Mapping[str, Any]) -> Any:
    if isinstance(tree, list):
        return [_unpacked(item, arrays) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {"$array"}:
        name, dtype, shape = tree["$array"]
        return arrays[name].view(np.dtype(dtype)).reshape(shape)
    return {key: _unpacked(item, arrays) for key, item in tree.items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 400 else f"{text[:390]} …"
