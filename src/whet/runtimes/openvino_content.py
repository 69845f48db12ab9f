"""The constants stored in an OpenVINO file, and its operators as OpenVINO runs them on this processor."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whet.runtimes.content import Operation
from whet.runtimes.openvino import TYPES, compiled, read

# Operators with weights -> the places of (data, weight) among their inputs. Biases are additions of their own.
WEIGHTED = {
    "Convolution": (0, 1),
    "GroupConvolution": (0, 1),
    "ConvolutionBackpropData": (0, 1),
    "GroupConvolutionBackpropData": (0, 1),
    "MatMul": (0, 1),
    "RNNSequence": (0, 3),
    "GRUSequence": (0, 3),
    "LSTMSequence": (0, 4),
    "RNNCell": (0, 2),
    "GRUCell": (0, 2),
    "LSTMCell": (0, 3),
}
# What may stand between a stored weight and its reader.
_BETWEEN = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose", "FakeQuantize", "Unsqueeze", "Squeeze"}
# Operators of compiled models that have weights.
COMPUTING = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "RNNCell"}
_NO_WORK = {"Const", "Input", "Output"}  # as the compiled model calls what computes nothing


def stored(path: Path) -> dict[str, int]:
    """Bytes of the constants by type; bytes that several constants share count once."""
    read(path)  # OpenVINO has seen the file: the text below is its own
    found: dict[tuple[int, int], str] = {}
    for layer in ElementTree.parse(path).getroot().iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            place = int(data.get("offset", 0)), int(data.get("size", 0))
            found.setdefault(place, TYPES.get(data.get("element_type", ""), str(data.get("element_type"))))
    sizes: dict[str, int] = {}
    for (_, size), name in found.items():
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def weighted(path: Path) -> list[Operation]:
    """The operators with weights as written; the weights followed through dequantizing to what is stored."""
    return list(_written(read(path)))


def computed(path: Path) -> list[Operation]:
    """The operators of the compiled model, with the type of the data they read on this processor."""
    written = weighted(path)
    operations = []
    for node in compiled(path, 1, "f32").get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        kind = _text(about, "layerType")
        sources = [node.input(index).get_source_output().get_node() for index in range(node.get_input_size())]
        if kind in _NO_WORK or (sources and all(_text(item.get_rt_info(), "layerType") == "Const" for item in sources)):
            continue  # what reads constants alone is computed once, when the file is opened
        names = _text(about, "originalLayersNames").split(",")
        weight = None
        if kind in COMPUTING:
            origins = [operation.weight for operation in written if any(_is_from(name, operation.name) for name in names)]
            weight = _constant_type(node, 1) or (origins[0] if origins else None)
        operations.append(Operation(kind, node.get_friendly_name(), _data_type(node), weight))
    return operations


def _is_from(name: str, original: str) -> bool:
    """Whether the compiled model's `name` is that of an operator in the file, of what was made of it, or of it and its bias."""
    return name == original or name.startswith(original + "/") or original == f"{name}/WithoutBiases"


def _data_type(node: Any) -> str:
    """The type of the first input: what OpenVINO calls an operator's precision may be that of its weights."""
    about = node.get_rt_info()
    taken = _text(about, "runtimePrecision")
    if node.get_input_size():
        source = node.input(0).get_source_output()
        given = _text(source.get_node().get_rt_info(), "outputPrecisions").split(",")
        taken = given[source.get_index()] if source.get_index() < len(given) and given[0] else taken
    return TYPES.get(taken, taken)


def _written(model: Any) -> Iterator[Operation]:
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in WEIGHTED:
            continue
        data, weight = WEIGHTED[kind]
        kept = _stored_type(node, weight)
        if kept is None and kind == "MatMul":  # a constant on the left of a product
            data, kept = weight, _stored_type(node, data)
        read_as = node.input(data).get_element_type().get_type_name()
        if kept is not None:
            channels = _size(node.get_output_partial_shape(0)) if "Conv" in kind else None
            yield Operation(kind, node.get_friendly_name(), TYPES.get(read_as, read_as), kept, channels=channels)


def _size(shape: Any) -> int | None:
    """The channels of an output of (n, channels, …); None where the file leaves them open."""
    return None if shape.rank.is_dynamic or shape[1].is_dynamic else int(shape[1].get_length())


def _stored_type(node: Any, place: int) -> str | None:
    """The type of the constant behind an input, None where the input is computed."""
    source = node.input(place).get_source_output().get_node()
    while source.get_type_name() in _BETWEEN:
        source = source.input(0).get_source_output().get_node()
    if source.get_type_name() != "Constant":
        return None
    kind = source.get_element_type().get_type_name()
    return TYPES.get(str(kind), str(kind))


def _constant_type(node: Any, place: int) -> str | None:
    """The type in which the compiled model holds a weight; None where it does not tell."""
    if place >= node.get_input_size():
        return None
    source = node.input(place).get_source_output().get_node()
    about = source.get_rt_info()
    if _text(about, "layerType") != "Const":
        return None
    return TYPES.get(_text(about, "runtimePrecision"))


def _text(about: Any, key: str) -> str:
    return str(about[key].astype(str)) if key in about else ""
