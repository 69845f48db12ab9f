"""A float .tflite file turned into one that stores and computes in integers, by a plan's scales and codes.

A tensor whose value the plan quantizes becomes int8; an operator is an integer operator when everything it reads and
writes is. Quantize and dequantize operators stand where integer and float operators meet, and at the file's borders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ExportError
from whet.formats.tflite import Array, File
from whet.numerics.affine import QParams, quantize_bias

# Operators with weights -> the places of (data, weight, bias) among their inputs, and the version that takes int8.
WEIGHTED = {
    "CONV_2D": (0, 1, 2, 3),
    "DEPTHWISE_CONV_2D": (0, 1, 2, 3),
    "FULLY_CONNECTED": (0, 1, 2, 12),
    "TRANSPOSE_CONV": (2, 1, 3, 3),
}
# Operators that hand codes on: input and output have one scale. With the version that takes int8.
MOVES = {
    "RESHAPE": 1,
    "SQUEEZE": 1,
    "EXPAND_DIMS": 1,
    "TRANSPOSE": 2,
    "MAX_POOL_2D": 2,
    "AVERAGE_POOL_2D": 2,
    "REDUCE_MAX": 2,
    "CONCATENATION": 2,
    "PAD": 2,
    "SPACE_TO_BATCH_ND": 2,
    "BATCH_TO_SPACE_ND": 2,
    "SLICE": 2,
    "STRIDED_SLICE": 2,
}
# Further operators with integer kernels, which rescale. With the version that takes int8.
RESCALES = {"ADD": 2, "MUL": 2, "MEAN": 2, "SOFTMAX": 2, "LOGISTIC": 2, "TANH": 2, "RELU": 2, "RELU6": 2}
_SAME_VALUES = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE")  # what they read and what they give are one value
_DEQUANTIZE_VERSION = {"int8": 2, "float16": 3}
_PER_CHANNEL_DEQUANTIZE = 5


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A weight in the file's layout: what is stored, and the scale of its codes (None for a 16-bit float)."""

    name: str
    array: Array
    scale: npt.NDArray[np.float32] | None = None
    axis: int = 0


Find = Callable[[str, Array], Stored | None]  # (operator, float weight) -> what is stored in its place; None stays float


class Integers:
    """The edit of one file. `values`: tensor index -> the quantizer of the value in it."""

    def __init__(self, file: File, values: dict[int, QParams], find: Find) -> None:
        self.file, self.values, self.find = file, dict(values), find
        self.stored: set[str] = set()  # names of the weights that were replaced
        self._codes: dict[int, int] = {}  # tensor -> the int8 tensor with its codes
        self._floats: dict[int, int] = {}  # tensor -> the float tensor with its rounded values
        self._unpacked: dict[int, int] = {}  # constant -> its dequantized form
        self._native: set[int] = set()  # tensors that integer operators write
        self._emitted: list[Any] = []

    def apply(self) -> None:
        """Edit the file.

        Raises:
            ExportError: a planned weight would compute in float, or was not found.
        """
        self._spread()
        for operator in self.file.operators:
            operator.inputs = [int(index) for index in operator.inputs]
            operator.outputs = [int(index) for index in operator.outputs]
            weight = self._weight(operator)
            if self._is_integer(operator, weight):
                self._to_integers(operator, weight)
            else:
                self._keep_float(operator, weight)
            self._emitted.append(operator)
        self.file.outputs = [self._float(index) for index in self.file.outputs]
        self.file.operators = self._emitted

    def _spread(self) -> None:
        """Give the tensors inside what the converter made of one operation the quantizer of its input or output."""
        moves = [op for op in self.file.operators if self.file.operator_name(op) in MOVES]
        self._spread_on(moves)
        produced = {int(op.outputs[0]): op for op in self.file.operators}
        readers: dict[int, list[str]] = {}
        for operator in self.file.operators:
            for index in operator.inputs:
                readers.setdefault(int(index), []).append(self.file.operator_name(operator))
        for operator in reversed(moves):
            params = self.values.get(int(operator.outputs[0]))
            for index in map(int, operator.inputs):
                source = produced.get(index)
                inside = source is not None and self.file.operator_name(source) in (*MOVES, *WEIGHTED, *RESCALES)
                alone = len(readers[index]) == 1 or all(name in _SAME_VALUES for name in readers[index])
                if params is not None and inside and self._is_activation(index) and alone:
                    self.values.setdefault(index, params)
        self._spread_on(moves)

    def _spread_on(self, moves: Sequence[Any]) -> None:
        for operator in moves:
            known = [self.values.get(int(i)) for i in operator.inputs if self._is_activation(int(i))]
            if known and known[0] is not None and all(_same(known[0], item) for item in known):
                self.values.setdefault(int(operator.outputs[0]), known[0])

    def _is_activation(self, index: int) -> bool:
        if index < 0 or self.file.dtype(index) != "FLOAT32":
            return False
        return self.file.constant(index) is None

    def _weight(self, operator: Any) -> Stored | None:
        name = self.file.operator_name(operator)
        if name not in WEIGHTED or len(operator.inputs) <= WEIGHTED[name][1]:
            return None
        array = self.file.constant(operator.inputs[WEIGHTED[name][1]])
        return self.find(name, array) if array is not None and array.dtype == np.float32 else None

    def _is_integer(self, operator: Any, weight: Stored | None) -> bool:
        name = self.file.operator_name(operator)
        out = [self.values.get(index) for index in operator.outputs]
        if len(out) != 1 or out[0] is None:
            return False
        if name in WEIGHTED:
            return weight is not None and weight.scale is not None and operator.inputs[WEIGHTED[name][0]] in self.values
        if name not in MOVES and name not in RESCALES:
            return False
        floats = [i for i in operator.inputs if i >= 0 and (i in self._native or self.file.dtype(i) == "FLOAT32")]
        read = [self.values.get(index) for index in floats]  # a constant has none
        if not read or any(item is None for item in read):
            return False
        return name in RESCALES or all(_same(out[0], item) for item in read)

    def _to_integers(self, operator: Any, weight: Stored | None) -> None:
        name = self.file.operator_name(operator)
        params = self.values[operator.outputs[0]]
        if weight is None:
            operator.inputs = [self._coded(i) if i in self.values else i for i in operator.inputs]
            version = (MOVES | RESCALES)[name]
        else:
            version = self._pack_weight(operator, name, weight)
        self.file.raise_version(operator, version)
        tensor = self.file.tensors[operator.outputs[0]]
        tensor.type, tensor.quantization = self.file.schema.TensorType.INT8, self._quantization(params)
        self._native.add(operator.outputs[0])

    def _pack_weight(self, operator: Any, name: str, weight: Stored) -> int:
        """Exchange weight and bias for their codes; the operator's version."""
        data, place, bias_place, version = WEIGHTED[name]
        if weight.scale is None:
            raise ExportError(f"The weight {weight.name!r} has no integer codes, and its {name} reads integers.")
        source = self.values[operator.inputs[data]]
        operator.inputs[data] = self._coded(operator.inputs[data])
        self.stored.add(weight.name)
        zeros = np.zeros(weight.scale.shape, np.int64)
        quantization = self.file.quantization(weight.scale, zeros, weight.axis)
        operator.inputs[place] = self.file.add_constant(weight.array, quantization)
        if len(operator.inputs) > bias_place and operator.inputs[bias_place] >= 0:
            bias = self.file.constant(operator.inputs[bias_place])
            if bias is None:
                raise ExportError(f"The bias of the {name} with the weight {weight.name!r} is not a constant in the file.")
            codes = quantize_bias(bias, source.scale, weight.scale)
            scale = np.asarray(source.scale * weight.scale, np.float32)
            operator.inputs[bias_place] = self.file.add_constant(codes, self.file.quantization(scale, zeros))
        return version if weight.scale.ndim or name != "FULLY_CONNECTED" else 4

    def _keep_float(self, operator: Any, weight: Stored | None) -> None:
        operator.inputs = [self._float(index) for index in operator.inputs]
        if weight is None:
            return
        name = self.file.operator_name(operator)
        if weight.scale is not None and self.values:
            raise ExportError(
                f"The {name} with the weight {weight.name!r} would compute in float, though the plan quantizes it: the "
                "converter changed the operations around it. Keep that layer float with keep=, and please report the model."
            )
        place = WEIGHTED[name][1]
        operator.inputs[place] = self._unpack(operator.inputs[place], weight)
        self.stored.add(weight.name)

    def _unpack(self, index: int, weight: Stored) -> int:
        """A float tensor computed from what is stored of a constant."""
        if index not in self._unpacked:
            quantization = None
            version = _DEQUANTIZE_VERSION[weight.array.dtype.name]
            if weight.scale is not None:
                quantization = self.file.quantization(weight.scale, np.zeros(weight.scale.shape, np.int64), weight.axis)
                version = _PER_CHANNEL_DEQUANTIZE if weight.scale.ndim else version
            constant = self.file.add_constant(weight.array, quantization)
            made = self.file.add_like(index, "FLOAT32")
            self._emitted.append(self.file.add_operator("DEQUANTIZE", [constant], [made], version))
            self._unpacked[index] = made
        return self._unpacked[index]

    def _coded(self, index: int) -> int:
        """The int8 tensor of a value."""
        if index in self._native:
            return index
        if index not in self._codes:
            made = self.file.add_like(index, "INT8", self._quantization(self.values[index]))
            self._emitted.append(self.file.add_operator("QUANTIZE", [index], [made]))
            self._codes[index] = made
        return self._codes[index]

    def _float(self, index: int) -> int:
        """The float tensor of a value, rounded as the plan has it; other tensors are as they are."""
        if index not in self.values:
            return index
        if index not in self._floats:
            made = self.file.add_like(index, "FLOAT32")
            self._emitted.append(
                self.file.add_operator("DEQUANTIZE", [self._coded(index)], [made], _DEQUANTIZE_VERSION["int8"])
            )
            self._floats[index] = made
        return self._floats[index]

    def _quantization(self, params: QParams) -> Any:
        """int8 codes: unsigned ones are shifted by 128, which is the same lattice."""
        shift = 0 if params.spec.symmetric else 128
        return self.file.quantization(params.scale, np.asarray(int(params.zero_point) - shift))


def _same(left: QParams | None, right: QParams | None) -> bool:
    if left is None or right is None:
        return left is right
    return bool(left.scale == right.scale) and bool(left.zero_point == right.zero_point)
