"""The tensors stored in a .tflite file, and its operators with the types they read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from whet.errors import require
from whet.runtimes.content import Operation
from whet.runtimes.litert import create

# Operators with weights -> the places of (data, weight, bias) among their inputs.
WEIGHTED: dict[str, tuple[int, int, int | None]] = {
    "CONV_2D": (0, 1, 2),
    "DEPTHWISE_CONV_2D": (0, 1, 2),
    "FULLY_CONNECTED": (0, 1, 2),
    "CONV_3D": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
    "CONV_3D_TRANSPOSE": (2, 1, 3),
    "BATCH_MATMUL": (0, 1, None),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (0, 1, None),
    "UNIDIRECTIONAL_SEQUENCE_RNN": (0, 1, 3),
}
# Convolutions -> the axis of the output channels in their kernels.
_CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3}


def stored(path: Path) -> dict[str, int]:
    """Bytes of the constant tensors by type; a buffer that several tensors share counts once."""
    model = _model(path)
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for graph in _graphs(model):
        for index in range(graph.TensorsLength()):
            tensor = graph.Tensors(index)
            size = _size(model, tensor)
            if size and tensor.Buffer() not in seen:
                seen.add(tensor.Buffer())
                name = _types()[tensor.Type()]
                sizes[name] = sizes.get(name, 0) + size
    return sizes


def weighted(path: Path) -> list[Operation]:
    """The operators with weights; the weights followed through dequantizers to what is stored."""
    return [operation for operation in computed(path) if operation.weight is not None]


def computed(path: Path) -> list[Operation]:
    """The operators of the file, which LiteRT runs as they are written."""
    model = _model(path)
    return [operation for graph in _graphs(model) for operation in _walk(model, graph)]


def _model(path: Path) -> Any:
    create(path, 1)  # LiteRT verifies every offset of the file; reading it is safe from here on
    schema = _schema()
    return schema.Model.GetRootAs(path.read_bytes(), 0)


def _schema() -> Any:
    return require("ai_edge_litert.schema_py_generated", "litert", "Reading a .tflite file")


def _graphs(model: Any) -> list[Any]:
    return [model.Subgraphs(index) for index in range(model.SubgraphsLength())]


def _size(model: Any, tensor: Any) -> int:
    """Bytes of a constant tensor; 0 for others. Buffer 0 is empty by definition."""
    buffer = model.Buffers(tensor.Buffer())
    return int(buffer.DataLength() or buffer.Size())


def _walk(model: Any, graph: Any) -> Iterator[Operation]:
    tensors = [graph.Tensors(index) for index in range(graph.TensorsLength())]
    types = [_types()[tensor.Type()] for tensor in tensors]
    constants = {index: types[index] for index, tensor in enumerate(tensors) if _size(model, tensor)}
    for position in range(graph.OperatorsLength()):
        operator = graph.Operators(position)
        inputs = [operator.Inputs(i) for i in range(operator.InputsLength())]
        outputs = [operator.Outputs(i) for i in range(operator.OutputsLength())]
        present = [index for index in inputs if index >= 0]
        if present and all(index in constants for index in present):
            constants.update(dict.fromkeys(outputs, constants[present[0]]))
        name = _operator_name(model.OperatorCodes(operator.OpcodeIndex()))
        label = (tensors[outputs[0]].Name() or b"").decode("utf-8", "replace") if outputs else ""
        data, weight, bias = WEIGHTED.get(name, (0, None, None))

        def at(place: int | None, inputs: list[int] = inputs) -> int:
            return inputs[place] if place is not None and place < len(inputs) else -1

        read = at(data) if at(data) >= 0 else (present + outputs)[0]
        axis = _CHANNELS.get(name)
        channels = int(tensors[at(weight)].Shape(axis)) if axis is not None and at(weight) in constants else None
        yield Operation(name, label, types[read], constants.get(at(weight)), constants.get(at(bias)), channels)


def _operator_name(code: Any) -> str:
    builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    if code.CustomCode():
        return str(code.CustomCode().decode("utf-8", "replace"))
    return _names("BuiltinOperator").get(builtin, f"OPERATOR_{builtin}")


def _types() -> dict[int, str]:
    return {number: name.lower() for number, name in _names("TensorType").items()}


@cache
def _names(enum: str) -> dict[int, str]:
    """Number -> name of an enumeration of the schema."""
    return {value: name for name, value in vars(getattr(_schema(), enum)).items() if isinstance(value, int)}
