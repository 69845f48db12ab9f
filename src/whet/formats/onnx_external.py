"""ONNX files of more than 2 GB: protobuf holds no more in one message, so the weights lie in a file of their own beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whet.errors import require

LARGEST = 2**31 - 2**20  # bytes of one protobuf message, less what an estimate may be off by
KEPT = 1024  # bytes: what is smaller stays in the message (scales, shapes)
_EACH = 256  # bytes that a constant may take beside its values


def size_of(model: Any) -> int:
    """About how many bytes an ONNX model would have as one message. Protobuf itself fails where these are too many."""
    graph = model.graph
    values = sum(len(item.raw_data) or item.ByteSize() for item in graph.initializer)
    return values + _EACH * len(graph.initializer) + sum(len(item.name) for item in graph.initializer) + _structure(graph)


def save(model: Any, path: Path) -> None:
    """Write an ONNX model at `path`; one that is too large for one message with its weights beside it, in `{name}.data`.

    The file names the other, so both move together under these names. An earlier `{name}.data` is replaced. A large model is
    empty of its weights afterwards.
    """
    onnx = require("onnx", "onnx", "Writing ONNX files")
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)
    if size_of(model) <= LARGEST:
        path.write_bytes(model.SerializeToString())
        return
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=beside.name,
        size_threshold=KEPT,
    )


def _structure(graph: Any) -> int:
    return sum(item.ByteSize() for part in (graph.node, graph.input, graph.output, graph.value_info) for item in part)
