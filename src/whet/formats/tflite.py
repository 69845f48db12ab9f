"""A .tflite file as editable lists of tensors and operators, through the schema's own object interface.

Only the main graph is edited. What is written holds no metadata, no names but those of inputs and outputs, each constant
once, and nothing that the outputs do not need. Format: https://github.com/google-ai-edge/LiteRT, schema.fbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ExportError, require

Array = npt.NDArray[Any]
EXTRA = "litert"
ALIGNMENT = 16  # what the schema demands of buffers (force_align)


def schema() -> Any:
    """The schema's generated module.

    Raises:
        MissingExtraError: LiteRT is not installed.
    """
    return require("ai_edge_litert.schema_py_generated", EXTRA, "Writing a .tflite file")


class File:
    """The main graph of a .tflite file. `tensors` and `operators` are the schema's objects, `inputs` and `outputs` indices."""

    def __init__(self, content: bytes) -> None:
        self.schema = schema()
        self.model = self.schema.ModelT.InitFromPackedBuf(content, 0)
        self.graph = self.model.subgraphs[0]
        self.tensors: list[Any] = list(self.graph.tensors)
        self.operators: list[Any] = list(self.graph.operators)
        self.inputs: list[int] = [int(i) for i in self.graph.inputs]
        self.outputs: list[int] = [int(i) for i in self.graph.outputs]
        self.output_names: list[str] = [f"output_{i}" for i in range(len(self.outputs))]
        self._codes = {v: k for k, v in vars(self.schema.BuiltinOperator).items() if isinstance(v, int)}
        self._types = {v: k for k, v in vars(self.schema.TensorType).items() if isinstance(v, int)}
        self._added: dict[tuple[Any, ...], int] = {}

    def operator_name(self, operator: Any) -> str:
        """The builtin's name, such as `CONV_2D`."""
        return str(self._codes[self.model.operatorCodes[operator.opcodeIndex].builtinCode])

    def dtype(self, index: int) -> str:
        """The tensor's type in the schema's words, such as `FLOAT32`."""
        return str(self._types[self.tensors[index].type])

    def constant(self, index: int) -> Array | None:
        """The values of a constant float32 or int32 tensor; None for others."""
        tensor = self.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        kind = {"FLOAT32": np.float32, "INT32": np.int32}.get(self.dtype(index))
        if data is None or len(data) == 0 or kind is None:
            return None
        shape = () if tensor.shape is None else tuple(int(n) for n in tensor.shape)
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), kind).reshape(shape)

    def add_constant(self, array: Array, quantization: Any = None) -> int:
        """A new constant tensor; an equal one that was added before is used again."""
        key = (array.dtype.str, array.shape, array.tobytes(), _key(quantization))
        if key not in self._added:
            buffer = self.schema.BufferT(data=np.frombuffer(array.tobytes(), np.uint8))
            self.model.buffers.append(buffer)
            kind = getattr(self.schema.TensorType, array.dtype.name.upper())
            tensor = self.schema.TensorT(shape=list(array.shape), type=kind, buffer=len(self.model.buffers) - 1, name=b"")
            tensor.quantization = quantization
            self.tensors.append(tensor)
            self._added[key] = len(self.tensors) - 1
        return self._added[key]

    def add_like(self, index: int, kind: str, quantization: Any = None) -> int:
        """A new variable tensor of the shape of another, of the type `kind`."""
        old = self.tensors[index]
        made = self.schema.TensorT(shape=old.shape, shapeSignature=old.shapeSignature, name=b"", hasRank=old.hasRank)
        made.type, made.quantization = getattr(self.schema.TensorType, kind), quantization
        self.tensors.append(made)
        return len(self.tensors) - 1

    def quantization(self, scale: Array, zero_point: Array, axis: int = 0) -> Any:
        """Quantization parameters: one scale, or one for each index of `axis`."""
        scales = np.atleast_1d(np.asarray(scale, np.float32))
        zeros = np.broadcast_to(np.asarray(zero_point, np.int64), scales.shape).copy()
        return self.schema.QuantizationParametersT(scale=scales, zeroPoint=zeros, quantizedDimension=axis)

    def join(self, joined: Mapping[int, int]) -> None:
        """Let what reads an input of the file read another tensor in its place, for each pair; operators are ordered anew."""
        if not joined:
            return
        self.inputs = [index for index in self.inputs if index not in joined]
        for operator in self.operators:
            operator.inputs = [joined.get(int(index), int(index)) for index in operator.inputs]
        waiting, self.operators = self.operators, []
        while waiting:
            awaited = {int(index) for operator in waiting for index in operator.outputs}
            ready = [operator for operator in waiting if awaited.isdisjoint(operator.inputs)]
            if not ready:
                raise ExportError("The operators of the file read each other in a circle. Please report the model.")
            self.operators += ready
            waiting = [operator for operator in waiting if not awaited.isdisjoint(operator.inputs)]

    def add_operator(self, name: str, inputs: list[int], outputs: list[int], version: int = 1) -> Any:
        """A new operator without options, not yet in the list."""
        return self.schema.OperatorT(opcodeIndex=self._opcode(name, version), inputs=inputs, outputs=outputs)

    def raise_version(self, operator: Any, version: int) -> None:
        """Let the operator be of at least that version."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        if code.version < version:
            operator.opcodeIndex = self._opcode(self.operator_name(operator), version)

    def _opcode(self, name: str, version: int) -> int:
        builtin = getattr(self.schema.BuiltinOperator, name)
        for index, code in enumerate(self.model.operatorCodes):
            if code.builtinCode == builtin and code.version == version:
                return index
        made = self.schema.OperatorCodeT(deprecatedBuiltinCode=min(builtin, 127), builtinCode=builtin, version=version)
        self.model.operatorCodes.append(made)
        return len(self.model.operatorCodes) - 1

    def to_bytes(self, input_names: list[str]) -> bytes:
        """The file: pruned of what the outputs do not need, its inputs and outputs named."""
        self._drop_unused()
        self._compact()
        self._name(input_names)
        model, graph = self.model, self.graph
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs, graph.name = self.inputs, self.outputs, None
        model.metadata, model.metadataBuffer, model.description = None, None, None
        for other in model.subgraphs[1:]:
            other.name = None
        flatbuffers: Any = require("flatbuffers", EXTRA, "Writing a .tflite file")
        self._share_vectors()
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _share_vectors(self) -> None:
        """Write equal scales and zero points once: those of a small file take more room than its operators."""
        written: dict[tuple[str, bytes], int] = {}
        for tensor in self.tensors:
            if tensor.quantization is not None and tensor.quantization.scale is not None:
                tensor.quantization = _SharedQuantization(self.schema, tensor.quantization, written)

    def _drop_unused(self) -> None:
        needed = set(self.outputs)
        kept = []
        for operator in reversed(self.operators):
            if any(int(index) in needed for index in operator.outputs) or not len(operator.outputs):
                needed.update(int(index) for index in operator.inputs)
                kept.append(operator)
        self.operators = kept[::-1]

    def _compact(self) -> None:
        """Keep used tensors, buffers and operator codes, each constant once."""
        used = {*self.inputs, *self.outputs}
        for operator in self.operators:
            for indices in (operator.inputs, operator.outputs, operator.intermediates):
                used.update(int(index) for index in (() if indices is None else indices) if index >= 0)
        order = {old: new for new, old in enumerate(sorted(used))}
        order[-1] = -1
        self.tensors = [self.tensors[old] for old in sorted(used)]
        self.inputs, self.outputs = [order[i] for i in self.inputs], [order[i] for i in self.outputs]
        for operator in self.operators:
            operator.inputs = [order[int(i)] for i in operator.inputs]
            operator.outputs = [order[int(i)] for i in operator.outputs]
            if operator.intermediates is not None:
                operator.intermediates = [order[int(i)] for i in operator.intermediates]
            operator.debugMetadataIndex = -1
        self._compact_buffers()
        self._compact_codes()

    def _compact_buffers(self) -> None:
        empty = self.schema.BufferT()
        buffers, places = [empty], {b"": 0}
        for tensor in self.tensors + [t for graph in self.model.subgraphs[1:] for t in graph.tensors]:
            buffer = self.model.buffers[tensor.buffer]
            data = b"" if buffer.data is None else np.asarray(buffer.data, np.uint8).tobytes()
            if data not in places:
                places[data] = len(buffers)
                buffers.append(_AlignedBuffer(self.schema, data))
            tensor.buffer = places[data]
        self.model.buffers = buffers

    def _compact_codes(self) -> None:
        operators = self.operators + [o for graph in self.model.subgraphs[1:] for o in graph.operators]
        used = sorted({operator.opcodeIndex for operator in operators})
        self.model.operatorCodes = [self.model.operatorCodes[index] for index in used]
        for operator in operators:
            operator.opcodeIndex = used.index(operator.opcodeIndex)

    def _name(self, input_names: list[str]) -> None:
        for tensor in self.tensors:
            tensor.name = None
        for graph in self.model.subgraphs[1:]:
            for tensor in graph.tensors:
                tensor.name = None
        maps: list[list[Any]] = []
        for indices, names in ((self.inputs, input_names), (self.outputs, self.output_names)):
            maps.append([self.schema.TensorMapT(name=name, tensorIndex=i) for i, name in zip(indices, names, strict=True)])
            for index, name in zip(indices, names, strict=True):
                self.tensors[index].name = name
        signature = self.schema.SignatureDefT(inputs=maps[0], outputs=maps[1], signatureKey="serving_default")
        self.model.signatureDefs = [signature]


class _AlignedBuffer:
    """A buffer whose data starts at a multiple of 16 bytes, which the generated class does not see to."""

    def __init__(self, generated: Any, data: bytes) -> None:
        self.schema, self.data = generated, data

    def Pack(self, builder: Any) -> int:  # the name that the generated code calls
        """Write it and return its offset."""
        builder.StartVector(1, len(self.data), ALIGNMENT)
        builder.head = builder.Head() - len(self.data)
        builder.Bytes[builder.Head() : builder.Head() + len(self.data)] = self.data
        vector = builder.EndVector()
        self.schema.BufferStart(builder)
        self.schema.BufferAddData(builder, vector)
        return int(self.schema.BufferEnd(builder))


class _SharedQuantization:
    """Quantization parameters whose vectors are written once for all that have them."""

    def __init__(self, generated: Any, parameters: Any, written: dict[tuple[str, bytes], int]) -> None:
        self.schema, self.parameters, self.written = generated, parameters, written

    def Pack(self, builder: Any) -> int:  # the name that the generated code calls
        """Write them and return their offset."""
        scale = self._vector(builder, np.asarray(self.parameters.scale, np.float32))
        zeros = self._vector(builder, np.asarray(self.parameters.zeroPoint, np.int64))
        self.schema.QuantizationParametersStart(builder)
        self.schema.QuantizationParametersAddScale(builder, scale)
        self.schema.QuantizationParametersAddZeroPoint(builder, zeros)
        self.schema.QuantizationParametersAddQuantizedDimension(builder, self.parameters.quantizedDimension)
        return int(self.schema.QuantizationParametersEnd(builder))

    def _vector(self, builder: Any, array: Array) -> int:
        key = (array.dtype.str, array.tobytes())
        if key not in self.written:
            self.written[key] = int(builder.CreateNumpyVector(array))
        return self.written[key]


def _key(quantization: Any) -> Any:
    if quantization is None:
        return None
    return quantization.scale.tobytes(), quantization.zeroPoint.tobytes(), quantization.quantizedDimension
