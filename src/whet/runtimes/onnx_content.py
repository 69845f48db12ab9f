"""The tensors stored in an ONNX file, and its operators as ONNX Runtime runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import RuntimeFileError, require
from whet.runtimes.content import Operation
from whet.runtimes.environment import VNNI, cpu_features
from whet.runtimes.onnxruntime import create

# Operators with weights -> the places of (data, weight, bias) among their inputs; None: they take no bias.
_PLAIN, _QUANTIZED = (0, 1, 2), (0, 3, 8)
WEIGHTED: dict[str, tuple[int, int, int | None]] = {
    "Conv": _PLAIN,
    "ConvTranspose": _PLAIN,
    "FusedConv": _PLAIN,
    "NhwcFusedConv": _PLAIN,
    "Gemm": _PLAIN,
    "FusedGemm": _PLAIN,
    "Attention": _PLAIN,
    "QAttention": _PLAIN,
    "MatMul": (0, 1, None),
    "FusedMatMul": (0, 1, None),
    "MatMulInteger": (0, 1, None),
    "MatMulIntegerToFloat": (0, 1, None),
    "DynamicQuantizeMatMul": (0, 1, None),
    "MatMulNBits": (0, 1, None),
    "ConvInteger": (0, 1, None),
    "RNN": (0, 1, 3),
    "GRU": (0, 1, 3),
    "LSTM": (0, 1, 3),
    "DynamicQuantizeLSTM": (0, 1, 3),
    "QLinearConv": _QUANTIZED,
    "QLinearMatMul": (0, 3, None),
    "QGemm": (0, 3, 6),
}
# Operators whose output has a type of its own: the place of the input that has it, or the type.
_FROM_INPUT = {
    "QuantizeLinear": 2,
    "DequantizeLinear": 1,
    "QLinearConv": 7,
    "QLinearMatMul": 7,
    "QLinearAdd": 7,
    "QLinearMul": 7,
    "QGemm": 8,
    "QLinearConcat": 1,
    "Where": 1,
    "OneHot": 2,
}
_GIVEN = (
    dict.fromkeys(("Shape", "Size", "ArgMax", "ArgMin", "NonZero"), "int64")
    | dict.fromkeys(
        ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf"), "bool"
    )
    | dict.fromkeys(("MatMulInteger", "ConvInteger"), "int32")
    | dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul"), "float32")
)
_DATA = {"Where": 1, "QLinearConcat": 2, "QLinearWhere": 1}  # the place of the data, where it is not the first input
_CONVOLUTIONS = frozenset({"Conv", "QLinearConv"})  # kernels of (output channels, …)
_PORTABLE = 64  # codes up to here cannot overflow 16 bits when two of their products with 8 bits are added


@dataclass(frozen=True, slots=True)
class _Constant:
    """A value that the file holds, or that follows from such values: the type and shape it is stored in."""

    dtype: str
    shape: tuple[int, ...] = ()


def stored(path: Path) -> dict[str, int]:
    """Bytes of the constants by type."""
    sizes: dict[str, int] = {}
    for graph in _graphs(_load(path).graph):
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        for tensor in (*graph.initializer, *(a.t for a in attributes if a.name == "value" and a.HasField("t"))):
            name = _type(tensor.data_type)
            count = 1
            for size in tensor.dims:
                count *= size
            sizes[name] = sizes.get(name, 0) + -(-count * _bits(name) // 8)
    return sizes


def weighted(path: Path) -> list[Operation]:
    """The operators with weights as written in the file; their weights followed through quantizers to what is stored."""
    return [operation for operation in _operations(_load(path)) if operation.weight is not None]


def computed(path: Path) -> list[Operation]:
    """The operators of the graph that ONNX Runtime has optimized for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        create(path, threads=1, optimized=optimized)
        return _operations(_load(optimized))


def cautions(path: Path, operations: Sequence[Operation]) -> list[str]:
    """Activations that are rounded inside products of codes; and whether the file computes the same on other x86 processors:
    where VNNI lacks, 8-bit products are added in 16 bits."""
    products = sum(operation.op == "MatMulNBits" for operation in operations)
    if products:
        return [
            f"{products} matrix products are computed on codes (MatMulNBits): ONNX Runtime rounds the activations that they "
            "read to 8 bits inside, which the simulation does not"
        ]
    features = cpu_features()
    if not any(operation.dtype == "uint8/int8" for operation in operations) or not _uses_all_codes(path):
        return []
    if features is None or "avx2" not in features:
        return []
    if VNNI & set(features):
        return [
            "built for processors with VNNI, like this one: on x86 processors without it sums of 8-bit products can overflow "
            "and outputs change; for those export with the target 'onnxruntime-portable'"
        ]
    return [
        "this processor has no VNNI: sums of 8-bit products can overflow here and outputs change; export with the target "
        "'onnxruntime-portable'"
    ]


def _uses_all_codes(path: Path) -> bool:
    """Whether a stored int8 weight has codes beyond ±64."""
    onnx: Any = require("onnx", "onnx", "Reading an ONNX file")
    for graph in _graphs(_load(path).graph):
        for tensor in graph.initializer:
            if tensor.data_type != onnx.TensorProto.INT8 or len(tensor.dims) < 2:
                continue
            codes = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent)).astype("int16")
            if codes.size and abs(codes).max() > _PORTABLE:
                return True
    return False


def _load(path: Path) -> Any:
    onnx: Any = require("onnx", "onnx", "Reading an ONNX file")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as cause:
        raise RuntimeFileError(f"{path.name!r} is not a readable ONNX file: it is truncated or of another format.") from cause


def _graphs(graph: Any) -> Iterator[Any]:
    """`graph` and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _operations(model: Any) -> list[Operation]:
    return list(_walk(model.graph, {}, {}))


def _walk(graph: Any, types: dict[str, str], constants: dict[str, _Constant]) -> Iterator[Operation]:
    """The operations of `graph` in order. types: of each value known. constants: value -> what it is stored as."""
    types, constants = dict(types), dict(constants)
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = _type(value.type.tensor_type.elem_type)
    for tensor in graph.initializer:
        types[tensor.name] = _type(tensor.data_type)
        constants[tensor.name] = _Constant(types[tensor.name], tuple(tensor.dims))
    for node in graph.node:
        inputs = list(node.input)
        produced = _output_type(node, types)
        for name in filter(None, node.output):
            types[name] = types.get(name, produced) if types.get(name) != "unknown" else produced
        if node.op_type == "Constant" or (inputs and all(name in constants for name in inputs if name)):
            root = constants.get(inputs[0], _Constant(produced)) if inputs else _Constant(produced)
            constants.update(dict.fromkeys(node.output, root))
        yield _operation(node, types, constants)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _walk(inner, types, constants)


def _operation(node: Any, types: dict[str, str], constants: dict[str, _Constant]) -> Operation:
    def stored_as(place: int | None) -> str | None:
        return constants[name(place)].dtype if name(place) in constants else None

    def name(place: int | None) -> str:
        return node.input[place] if place is not None and place < len(node.input) else ""

    label = node.name or (node.output[0] if node.output else "")
    if node.op_type in WEIGHTED:
        data, weight, bias = WEIGHTED[node.op_type]
        if weight == 1 and name(weight) not in constants and name(data) in constants:
            data, weight = weight, data  # a constant on the left of a product
        if name(weight) in constants and name(data) not in constants:
            read = types.get(name(data), "unknown")
            kernel = constants[name(weight)].shape if node.op_type in _CONVOLUTIONS else ()
            return Operation(node.op_type, label, read, stored_as(weight), stored_as(bias), int(kernel[0]) if kernel else None)
        return Operation(node.op_type, label, types.get(name(data), "unknown"))
    first = name(_DATA.get(node.op_type, 0)) or (node.output[0] if node.output else "")
    return Operation(node.op_type, label, types.get(first, "unknown"))


def _output_type(node: Any, types: dict[str, str]) -> str:
    """The type of `node`'s first output."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    op = node.op_type
    if op == "Cast":
        return _type(attributes["to"].i)
    if op in ("Constant", "ConstantOfShape") and "value" in attributes:
        return _type(attributes["value"].t.data_type)
    if op == "Constant":
        return "int64" if any(name.startswith("value_int") for name in attributes) else "float32"
    if op == "ConstantOfShape":
        return "float32"
    if op in _GIVEN:
        return _GIVEN[op]
    if op in _FROM_INPUT:
        place = _FROM_INPUT[op]
        if place < len(node.input) and node.input[place]:
            return types.get(node.input[place], "unknown")
        return "float32" if op == "QGemm" else "uint8"
    known = [types[name] for name in node.input if types.get(name, "unknown") != "unknown"]
    return known[0] if known else "unknown"


def _type(number: int) -> str:
    onnx: Any = require("onnx", "onnx", "Reading an ONNX file")
    if number == 0:
        return "unknown"
    name: str = onnx.TensorProto.DataType.Name(number).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _bits(name: str) -> int:
    digits = "".join(c for c in name.split("e")[0] if c.isdigit())
    return int(digits) if digits else 8
