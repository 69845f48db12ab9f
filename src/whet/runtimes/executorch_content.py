"""The constants stored in a .pte file, and its operators: those of the XNNPACK delegate, and those of portable kernels."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from whet.errors import RuntimeFileError, require
from whet.runtimes.content import Operation
from whet.runtimes.executorch import dtype_name, read_file, silent

BACKEND = "XnnpackBackend"
_DTYPES = {
    "fp32": "float32",
    "pfp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "qint8": "int8",
    "qcint8": "int8",
    "qdint8": "int8",
    "qpint8": "int8",
    "quint8": "uint8",
    "qint32": "int32",
    "qcint32": "int32",
    "int32": "int32",
    "qcint4": "int4",
    "qbint4": "int4",
}
_INFINITE = re.compile(r"(?<=: )(-?)inf\b")  # flatc writes bounds so, and JSON knows them by another name
_WEIGHTED = {"aten::convolution", "aten::linear", "aten::addmm", "aten::mm"}  # portable kernels with (data, weight, bias)
_PLACES = {"aten::addmm": (1, 2, 0), "aten::mm": (0, 1, None)}


def stored(path: Path) -> dict[str, int]:
    """Bytes of the constants by type: those of the program and those of its XNNPACK delegates, each once.

    Scales beside per-channel weights count as float32; a delegate to another backend keeps its own format: "unknown".
    """
    file = read_file(path)
    sizes: dict[str, int] = {}
    seen: set[Any] = set()

    def count(key: Any, dtype: str, size: int) -> None:
        if size and key not in seen:
            seen.add(key)
            sizes[dtype] = sizes.get(dtype, 0) + size

    for plan in file.program.execution_plan:
        for value in plan.values:
            index = getattr(value.val, "data_buffer_idx", 0)
            if index:
                count(("constant", index), dtype_name(value.val), len(file.program.constant_buffer[index].storage))
        for delegate in plan.delegates:
            data = file.program.backend_delegate_data[delegate.processed.index].data
            if delegate.id != BACKEND:
                count(("delegate", delegate.processed.index), "unknown", len(data))
                continue
            graph = _graph(bytes(data))
            for key, dtype, size in _constants(graph, file):
                count(key, dtype, size)
    return sizes


def weighted(path: Path) -> list[Operation]:
    """The operators with weights, as they are stored."""
    return [operation for operation in computed(path) if operation.weight is not None]


def computed(path: Path) -> list[Operation]:
    """The operators of the file, which ExecuTorch runs as they are written: XNNPACK's named "XNN…", the portable "aten::…".

    A delegate to another backend cannot be read, and is one operator of type "unknown".
    """
    file = read_file(path)
    found: list[Operation] = []
    for plan in file.program.execution_plan:
        if plan.name != "forward":
            continue
        for chain in plan.chains:
            for number, instruction in enumerate(chain.instructions):
                call = instruction.instr_args
                if hasattr(call, "delegate_index"):
                    delegate = plan.delegates[call.delegate_index]
                    data = bytes(file.program.backend_delegate_data[delegate.processed.index].data)
                    if delegate.id == BACKEND:
                        found += _delegated(_graph(data), call.delegate_index)
                    else:
                        found.append(Operation(delegate.id, f"delegate {call.delegate_index}", "unknown", delegated=True))
                elif hasattr(call, "op_index"):
                    found.append(_portable(plan, call, number))
    return found


def _portable(plan: Any, call: Any, number: int) -> Operation:
    name = plan.operators[call.op_index].name
    values = [plan.values[index].val for index in call.args]
    tensors = [value for value in values if hasattr(value, "scalar_type")]
    data, weight, bias = _PLACES.get(name, (0, 1, 2)) if name in _WEIGHTED else (0, None, None)

    def constant(place: int | None) -> str | None:
        value = values[place] if place is not None and place < len(values) else None
        return dtype_name(value) if getattr(value, "data_buffer_idx", 0) else None

    read = values[data] if data < len(values) and hasattr(values[data], "scalar_type") else (tensors or [None])[0]
    dtype = "none" if read is None else dtype_name(read)
    return Operation(name, f"instruction {number}", dtype, constant(weight), constant(bias), delegated=False)


def _delegated(graph: Any, index: int) -> Iterator[Operation]:
    """The operators of an XNNPACK graph."""
    tensors = _tensors(graph)
    constants = {key for key, tensor in tensors.items() if tensor["constant_buffer_idx"]}
    for number, node in enumerate(graph["xnodes"]):
        body = node["xnode_union"]
        name = f"delegate {index}, node {number}"
        first = body.get("input1_id", body.get("input_id", body.get("query_id")))
        weight, bias = (tensors[body[key]] if body.get(key) in constants else None for key in ("filter_id", "bias_id"))
        yield Operation(
            node["xnode_union_type"],
            name,
            _dtype(tensors[first]),
            None if weight is None else _dtype(weight),
            None if bias is None else _dtype(bias),
            channels=int(weight["dims"][0]) if weight is not None and "Conv" in node["xnode_union_type"] else None,
            delegated=True,
        )


def _tensors(graph: Any) -> dict[int, Any]:
    """Value id -> tensor."""
    values = [value["xvalue_union"] for value in graph["xvalues"]]
    return {tensor["id_out"]: tensor for tensor in (value.get("tensor_value", value) for value in values)}


def _dtype(tensor: Any) -> str:
    kind = str(tensor["datatype"]).removeprefix("xnn_datatype_")
    return _DTYPES.get(kind, kind)


def _constants(graph: Any, file: Any) -> Iterator[tuple[Any, str, int]]:
    """(key, type, bytes) of every constant and of every list of scales in an XNNPACK graph."""
    data = graph["constant_data"]
    for value in graph["xvalues"]:
        body = value["xvalue_union"]
        tensor = body.get("tensor_value", body)
        places = [(tensor["constant_buffer_idx"], _dtype(tensor))]
        if "scale_buffer_idx" in body.get("quant_params", {}):
            places.append((body["quant_params"]["scale_buffer_idx"], "float32"))
        for index, dtype in places:
            if index:
                key = data[index].get("named_key")
                size = _named_size(file, key) if key else data[index]["size"]
                yield ("named", key) if key else (id(graph), index), dtype, size


def _named_size(file: Any, key: str) -> int:
    if file.named_data is None or key not in file.named_data.pte_data:
        raise RuntimeFileError(f"The weights {key!r} are not in the file; Whet reads files that hold all of their weights.")
    return len(file.named_data.buffers[file.named_data.pte_data[key].buffer_index])


@lru_cache(maxsize=64)
def _graph(data: bytes) -> Any:
    """The graph of an XNNPACK delegate, as its schema names things.

    Raises:
        RuntimeFileError: the data has another format.
    """
    with silent():
        header: Any = require(
            "executorch.backends.xnnpack.serialization.xnnpack_graph_serialize", "executorch", "Reading a .pte file"
        ).XNNHeader
        flatbuffer: Any = require("executorch.exir._serialize._flatbuffer", "executorch", "Reading a .pte file")
        schema = files("executorch.backends.xnnpack.serialization").joinpath("schema.fbs").read_bytes()
        try:
            head = header.from_bytes(data[: header.EXPECTED_LENGTH])
            body = data[head.flatbuffer_offset : head.flatbuffer_offset + head.flatbuffer_size]
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "schema.fbs").write_bytes(schema)
                Path(folder, "graph.bin").write_bytes(body)
                flatbuffer._flatc_decompile(folder, str(Path(folder, "schema.fbs")), str(Path(folder, "graph.bin")))
                return json.loads(_INFINITE.sub(r"\1Infinity", Path(folder, "graph.json").read_text()))
        except Exception as cause:  # what a damaged delegate makes the parser raise is open
            raise RuntimeFileError(
                f"The XNNPACK delegate has a format that this ExecuTorch does not read ({type(cause).__name__}: {cause})."
            ) from cause
