"""Exported programs of PyTorch (.pt2) run by PyTorch itself, on the CPU, and what they hold.

A quantized program stores integers and computes in float: it is read by other tools, and shows what they start from.
`torch.export.load` is PyTorch's own reader: open only files that you trust.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import RuntimeFileError, require
from whet.runtimes.base import Array, Session, Slot
from whet.runtimes.content import Operation

WEIGHTED = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
_DEQUANTIZE = "quantized_decomposed.dequantize"


class ProgramSession(Session):
    """A .pt2 file as a PyTorch module. PyTorch's threads belong to the process: `threads` sets them for all sessions."""

    name = "torch"

    def __init__(self, path: Path, threads: int) -> None:
        """Open `path`.

        Raises:
            RuntimeFileError: the file is truncated, foreign, or of another version.
            MissingExtraError: PyTorch is not installed.
        """
        self._torch: Any = require("torch", "torch", "Running a .pt2 file")
        self.file, self.threads, self.version = path.name, threads, str(self._torch.__version__)
        program = load(path)
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        signature = program.graph_signature
        self._spec = program.call_spec.in_spec
        names = [str(name) for name in signature.user_inputs]
        self.inputs = tuple(_slot(label, nodes[name]) for label, name in zip(self._labels(names), names, strict=True))
        returned = [str(name) for name in signature.user_outputs]
        outputs = self._unflatten(list(range(len(returned))), program.call_spec.out_spec)
        labels = dict(_leaves(outputs))
        self.outputs = tuple(_slot(labels[i], nodes[name]) for i, name in enumerate(returned))
        self._module = program.module(check_guards=False)
        self._arguments: tuple[Any, Any] = ((), {})
        self._result: Any = None

    def _unflatten(self, flat: list[Any], spec: Any) -> Any:
        return self._torch.utils._pytree.tree_unflatten(flat, spec)

    def _labels(self, names: list[str]) -> list[str]:
        """The names of keyword arguments where they alone are given, else the program's own."""
        args, kwargs = self._unflatten(list(names), self._spec)
        return [str(key) for key in kwargs] if not args and len(kwargs) == len(names) else names

    def _place(self, arrays: Sequence[Array]) -> None:
        tensors = [self._torch.from_numpy(np.array(array)) for array in arrays]
        self._arguments = self._unflatten(tensors, self._spec)

    def invoke(self) -> None:
        """Compute once on what was placed.

        Raises:
            RuntimeFileError: PyTorch fails, with its own words.
        """
        args, kwargs = self._arguments
        before = self._torch.get_num_threads()
        try:
            self._torch.set_num_threads(self.threads)
            with self._torch.inference_mode():
                self._result = self._module(*args, **kwargs)
        except Exception as cause:
            raise RuntimeFileError(f"PyTorch could not run {self.file!r}: {cause}") from cause
        finally:
            self._torch.set_num_threads(before)

    def _fetch(self) -> Sequence[Array]:
        return [np.array(item) for item in self._torch.utils._pytree.tree_leaves(self._result)]


def load(path: Path) -> Any:
    """The exported program in a .pt2 file.

    Raises:
        RuntimeFileError: the file cannot be read.
        MissingExtraError: PyTorch is not installed.
    """
    torch: Any = require("torch", "torch", "Running a .pt2 file")
    require("whet.torch.decomposed", "torch", "Running a .pt2 file")  # registers the operators of quantized programs
    if not zipfile.is_zipfile(path):
        raise RuntimeFileError(f"{path.name!r} is not a .pt2 file, or is truncated: a zip archive was expected.")
    from whet.torch.program import first_line, quietly

    with quietly():
        try:
            return torch.export.load(path)
        except Exception as cause:
            raise RuntimeFileError(
                f"PyTorch {torch.__version__} cannot read {path.name!r}: it is damaged, or was written by another version. "
                f"It says: {first_line(cause)}"
            ) from cause


def stored(path: Path) -> dict[str, int]:
    """Bytes of the parameters, buffers and constants by type; shared storage counts once."""
    program = load(path)
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for tensor in (*program.state_dict.values(), *program.constants.values()):
        if hasattr(tensor, "untyped_storage") and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            name = _dtype(tensor)
            sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
    return sizes


def weighted(path: Path) -> list[Operation]:
    """The operators with weights; the weights followed through dequantizers to what is stored."""
    return [operation for operation in computed(path) if operation.weight is not None]


def computed(path: Path) -> list[Operation]:
    """The operators of the program, which PyTorch runs as they are written."""
    found = []
    for node in load(path).graph.nodes:
        values = [arg for arg in node.args if hasattr(arg, "meta")] if node.op == "call_function" else []
        tensors = [arg for arg in values if hasattr(arg.meta.get("val"), "dtype")]
        if not tensors:
            continue
        op = node.target.overloadpacket.__name__ if hasattr(node.target, "overloadpacket") else str(node.target)
        operands = list(node.args[1:3]) if op in WEIGHTED else []
        weight, bias = (*(_stored_type(arg) for arg in operands), None, None)[:2]
        found.append(Operation(op, node.name, _dtype(tensors[0].meta["val"]), weight, bias))
    return found


def _stored_type(node: Any) -> str | None:
    while getattr(node, "op", None) == "call_function" and str(node.target).startswith((_DEQUANTIZE, "aten.to", "aten._to")):
        node = node.args[0]
    return _dtype(node.meta["val"]) if getattr(node, "op", None) == "placeholder" else None


def _leaves(value: Any, prefix: str = "") -> list[tuple[int, str]]:
    """(position, name) of every output: keys of dicts, positions in tuples, "output" for a single one."""
    if isinstance(value, dict):
        items = [(f"{prefix}_{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        items = [(f"{prefix or 'output'}_{index}", item) for index, item in enumerate(value)]
    else:
        return [(value, prefix or "output")]
    return [leaf for name, item in items for leaf in _leaves(item, name)]


def _slot(name: str, value: Any) -> Slot:
    return Slot(name, tuple(size if isinstance(size, int) else None for size in value.shape), _dtype(value))


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
