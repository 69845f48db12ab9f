"""OpenVINO files (.xml with its .bin) from ONNX files: the same codes and scales, in the form that OpenVINO wants."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from whet.errors import ExportError, require
from whet.formats import onnx_external

_NUMBERED = re.compile(r"[A-Z][A-Za-z]+_\d+")  # what OpenVINO calls an operator that bears no name


def from_onnx(source: Path, path: Path, *, half: bool = False) -> None:
    """Write the ONNX file `source` as `path`, an .xml file, and its weights beside it in a .bin file.

    Integer weights stay integers, 16-bit ones 16 bits, and activations are quantized where the ONNX file says. Biases become
    floats of the same values: OpenVINO adds them in float. half: store all float weights as float16. The file says nothing
    of where and how it was made.

    Raises:
        ExportError: an operator has no OpenVINO form.
        MissingExtraError: OpenVINO or onnx is not installed.
    """
    openvino = require("openvino", "openvino", "Writing OpenVINO files")
    onnx = require("onnx", "onnx", "Writing OpenVINO files")
    model = onnx.load(str(source))
    float_biases(model.graph)
    with tempfile.TemporaryDirectory(prefix="whet-") as folder, _quietly():
        rewritten = Path(folder) / "model.onnx"
        halves = _halves(model.graph)
        onnx_external.save(model, rewritten)
        try:
            converted = openvino.convert_model(str(rewritten))
            _keep_halves(converted, halves)
            openvino.save_model(converted, str(path), compress_to_fp16=half)
        except Exception as cause:
            if isinstance(cause, OSError):
                raise
            raise ExportError(f"OpenVINO {openvino.__version__} cannot take this model: {_first(cause)}") from cause
    _compact(path)


def float_biases(graph: Any) -> None:
    """*In place*: the int32 constants behind a dequantize, and the dequantize, become float32 constants of the same values."""
    numpy_helper = require("onnx", "onnx", "Writing OpenVINO files").numpy_helper
    arrays = {item.name: item for item in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        codes = arrays.get(node.input[0])
        if codes is None or node.input[1] not in arrays or numpy_helper.to_array(codes).dtype != np.int32:
            continue
        scale = numpy_helper.to_array(arrays[node.input[1]])  # one, or one for each entry: a bias has one axis
        values = numpy_helper.to_array(codes).astype(np.float32) * scale.astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for item in [item for item in graph.initializer if item.name in arrays and arrays[item.name].data_type == 6]:
        if item.name not in used:
            graph.initializer.remove(item)


def _halves(graph: Any) -> dict[bytes, tuple[Any, Any]]:
    """What an ONNX graph stores in 16 bits: the values as float32 -> the 16 bits and OpenVINO's name for the type."""
    openvino = require("openvino", "openvino", "Writing OpenVINO files")
    onnx = require("onnx", "openvino", "Writing OpenVINO files")
    kinds = {onnx.TensorProto.FLOAT16: openvino.Type.f16, onnx.TensorProto.BFLOAT16: openvino.Type.bf16}
    found = {}
    for item in graph.initializer:
        if item.data_type in kinds:
            array = np.ascontiguousarray(onnx.numpy_helper.to_array(item))
            found[array.astype(np.float32).tobytes()] = (array, kinds[item.data_type])
    return found


def _keep_halves(converted: Any, found: dict[bytes, tuple[Any, Any]]) -> None:
    """*In place*: what the ONNX file stores in 16 bits is stored so again; OpenVINO's converter has made it float32."""
    openvino = require("openvino", "openvino", "Writing OpenVINO files")
    constants = [node for node in converted.get_ops() if node.get_type_name() == "Constant"] if found else []
    for node in constants:
        if node.get_element_type() != openvino.Type.f32 or node.data.tobytes() not in found:
            continue
        array, kind = found[node.data.tobytes()]
        shape = list(node.get_output_shape(0))
        tensor = openvino.Tensor(kind, shape)
        tensor.data[...] = array.view(np.float16).reshape(shape)  # the bits; NumPy has no bfloat16
        short = openvino.op.Constant(tensor)
        short.set_friendly_name(node.get_friendly_name())
        widened = openvino.opset13.convert(short, "f32")
        for reader in list(node.output(0).get_target_inputs()):
            reader.replace_source_output(widened.output(0))


def _compact(path: Path) -> None:
    """Rewrite the .xml without indentation (a third of a small file), without the record of the conversion, and with the
    names that the converter numbered (it counts through a process) numbered from 0: the same model gives the same file.
    """
    tree = ElementTree.parse(path)  # written by OpenVINO a moment ago
    root = tree.getroot()
    for element in root.iter():
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    for record in root.findall("rt_info"):
        root.remove(record)
    for number, layer in enumerate(layer for layer in root.iter("layer") if _NUMBERED.fullmatch(layer.get("name", ""))):
        layer.set("name", f"{layer.get('type')}_{number}")
    path.write_bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _first(cause: BaseException) -> str:
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(cause).__name__


@contextlib.contextmanager
def _quietly() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
