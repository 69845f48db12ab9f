"""What an exported file stores and what it computes in, read back from the file itself.

Names of operators prove nothing: a "quantized" file may hold float weights, and a file full of quantizers may compute
in float. So the types come from the stored tensors, and from the operators as the runtime will run them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from whet.errors import ExportError, RuntimeFileError
from whet.runtimes.sessions import check_file, runtime_of

WEIGHT_TYPES = frozenset({"int8", "uint8", "int4", "uint4", "int2", "uint2"})
WIDE_TYPES = frozenset({"int16", "uint16"})  # of activations
BIAS_TYPES = frozenset({"int32", "int64"})  # 64 bits beside 16-bit activations
BLOCK = 8  # vector kernels work on at least so many channels at once
_NAMED = 8  # how many offending operators an error names


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator. data: the type of what it reads. weight, bias: the types that its constants are stored in, else None.

    channels: a convolution's output channels, None where they are not read. delegated: whether a delegate of the runtime
    (XNNPACK, say) computes it, None where the file or the runtime does not tell.
    """

    op: str
    name: str
    data: str
    weight: str | None = None
    bias: str | None = None
    channels: int | None = None
    delegated: bool | None = None

    @property
    def dtype(self) -> str:
        """`data`, or `data/weight` where they differ: `"uint8/int8"`."""
        return self.data if self.weight in (None, self.data) else f"{self.data}/{self.weight}"

    @property
    def is_integer(self) -> bool:
        """Whether it reads integers; "float32/int8" is a float operator that unpacks stored integers."""
        return self.data.removeprefix("u").startswith("int")

    def __str__(self) -> str:
        return f"{self.op} {self.name!r} ({self.dtype})"


def read_dtypes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`{"stored": {dtype: bytes}, "computed": {operator: {dtype: count}}}`.

    stored: the constants in the file. computed: the operators as the runtime runs them on this machine (of an ONNX file,
    those of the graph that ONNX Runtime has optimized), with the type of the data they read, `"uint8/int8"` where the
    weight has another.

    Raises:
        RuntimeFileError: the file cannot be read.
        MissingExtraError: its runtime is not installed.
    """
    path = check_file(path)
    reader = _reader(path)
    return _dtypes(reader, path, reader.computed(path))


@dataclass(frozen=True, slots=True)
class Content:
    """All that a file says of itself. dtypes: see `read_dtypes`. operators: see `Evidence`. warnings: in plain words."""

    dtypes: dict[str, Any]
    operators: dict[str, Any] | None
    warnings: tuple[str, ...]


def read_content(path: str | os.PathLike[str]) -> Content:
    """The types, the operators by how they compute, and what a user should know of them.

    Raises: as `read_dtypes`.
    """
    path = check_file(path)
    reader = runtime_of(path).reader()
    if reader is None:
        return Content({"stored": {}, "computed": {}}, None, ())
    operations: list[Operation] = reader.computed(path)
    found = [*_still_float(operations), *_odd_channels(reader.weighted(path))]
    if hasattr(reader, "cautions"):  # what only this format's reader can know
        found += reader.cautions(path, operations)
    return Content(_dtypes(reader, path, operations), _summary(operations), tuple(found))


def _summary(operations: Sequence[Operation]) -> dict[str, Any]:
    known = [operation.delegated for operation in operations if operation.delegated is not None]
    floats = [operation for operation in operations if operation.data.startswith(("float", "bfloat"))]
    integers = [operation for operation in operations if operation.data in WEIGHT_TYPES | WIDE_TYPES]
    summary = {"quantized": len(integers), "float": len(floats), "other": len(operations) - len(integers) - len(floats)}
    if known:
        return summary | {"delegated": sum(known)}
    return summary | {"delegated": None, "reason": "this runtime does not tell which operators a delegate runs"}


def _still_float(operations: Sequence[Operation]) -> list[str]:
    """In a file that computes in integers, the operators with weights that do not."""
    weighted = [operation for operation in operations if operation.weight is not None]
    floats = [operation for operation in weighted if not operation.is_integer]
    if not floats or (len(floats) == len(weighted) and not any(op.weight in WEIGHT_TYPES for op in floats)):
        return []
    return [f"still float: {len(floats)} of {len(weighted)} operators with weights run in float: {_list(floats)}"]


def _odd_channels(operations: Sequence[Operation]) -> list[str]:
    odd = [operation for operation in operations if operation.channels is not None and operation.channels % BLOCK]
    if not odd:
        return []
    named = ", ".join(f"{repr(one.name) if one.name else one.op} has {one.channels}" for one in odd[:_NAMED])
    more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
    return [
        f"odd channel counts: {len(odd)} of the convolutions have output channels that are no multiple of {BLOCK} ({named}"
        f"{more}); kernels compute in blocks of {BLOCK} or more and throw the rest away"
    ]


def _dtypes(reader: ModuleType, path: Path, operations: Sequence[Operation]) -> dict[str, Any]:
    computed: dict[str, dict[str, int]] = {}
    for operation in operations:
        counts = computed.setdefault(operation.op, {})
        counts[operation.dtype] = counts.get(operation.dtype, 0) + 1
    stored: dict[str, int] = reader.stored(path)
    return {"stored": dict(sorted(stored.items())), "computed": dict(sorted(computed.items()))}


def check_integer(path: str | os.PathLike[str], *, float_allowed: int = 0) -> dict[str, int]:
    """Prove that the operators with weights compute in integers, on weights stored in 8 bits and biases in 32.

    `float_allowed`: how many operators with weights were meant to stay in float (the layers reported as skipped). The
    result is `{"integer": n, "float": m}`.

    Raises:
        ExportError: more than `float_allowed` operators compute in float or store float weights, none computes in
            integers, or an integer operator's bias is not stored as int32; they are named.
        RuntimeFileError: the file cannot be read.
    """
    path = check_file(path)
    reader = _reader(path)
    computed = [operation for operation in reader.computed(path) if operation.weight is not None]
    written = [operation for operation in reader.weighted(path) if operation.weight is not None]
    floats = [operation for operation in computed if not operation.is_integer]
    if len(floats) > float_allowed:
        raise ExportError(
            f"{path.name!r} should compute in integers, but {len(floats)} of its {len(computed)} operators with weights run "
            f"in float on this machine ({float_allowed} were meant to): {_list(floats)}."
        )
    stored = [operation for operation in written if operation.weight not in WEIGHT_TYPES]
    if len(stored) > float_allowed:
        raise ExportError(
            f"{path.name!r} should store integer weights, but {len(stored)} operators have weights stored in another type "
            f"({float_allowed} were meant to): {_list(stored)}."
        )
    if len(floats) == len(computed):
        raise ExportError(f"{path.name!r} should compute in integers, but none of its operators with weights does.")
    kept = {id(operation) for operation in stored}
    biases = [op for op in written if op.bias is not None and op.bias not in BIAS_TYPES and id(op) not in kept]
    if len(biases) > float_allowed:
        named = "; ".join(f"{operation} has a {operation.bias} bias" for operation in biases[:_NAMED])
        raise ExportError(f"{path.name!r} should store the biases of integer operators as int32: {named}.")
    return {"integer": len(computed) - len(floats), "float": len(floats)}


def _list(operations: Sequence[Operation]) -> str:
    more = len(operations) - _NAMED
    return ", ".join(str(operation) for operation in operations[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _reader(path: Path) -> ModuleType:
    reader = runtime_of(path).reader()
    if reader is None:
        raise RuntimeFileError(f"Nothing here reads the operators of {path.name!r}: its format does not tell them.")
    return reader
