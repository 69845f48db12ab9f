"""Edits that leave a float .tflite file's results as they are, and let its operators run in integers.

The converter writes a dense layer over three axes, or a dilated convolution, as an operator between two that move values,
with bias and activation behind these; computed shapes stand where the batch alone is unknown.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from whet.formats.tflite import File

_ACTIVATIONS = {"RELU": 1, "RELU6": 3}  # the schema's ActivationFunctionType
_MOVES = {"RESHAPE", "SQUEEZE", "BATCH_TO_SPACE_ND"}
_BIAS_PLACE = {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2}


def tidy(file: File) -> None:
    """Make shapes constant and bring bias and activation back into the operators they belong to. `file.outputs` stay."""
    _dense_shapes(file)
    _constant_shapes(file)
    while _absorb(file):
        pass


def _dense_shapes(file: File) -> None:
    """A dense layer's input is two-dimensional, and as wide as its weight."""
    produced = {int(operator.outputs[0]): operator for operator in file.operators}
    for operator in file.operators:
        if file.operator_name(operator) != "FULLY_CONNECTED":
            continue
        source = produced.get(int(operator.inputs[0]))
        if source is None or file.operator_name(source) != "RESHAPE" or len(source.inputs) < 2:
            continue
        if file.constant(int(source.inputs[1])) is None:
            width = int(file.tensors[operator.inputs[1]].shape[1])
            _reshape_to(file, source, [-1, width])
            tensor = file.tensors[source.outputs[0]]
            tensor.shape, tensor.shapeSignature = [1, width], [-1, width]


def _constant_shapes(file: File) -> None:
    """Give a reshape whose shape is computed, but unknown in one dimension only, that shape as a constant."""
    for operator in file.operators:
        if file.operator_name(operator) != "RESHAPE" or len(operator.inputs) < 2:
            continue
        tensor = file.tensors[operator.outputs[0]]
        signature = tensor.shape if tensor.shapeSignature is None else tensor.shapeSignature
        if signature is None or file.constant(int(operator.inputs[1])) is not None:
            continue
        sizes = [int(size) for size in signature]
        if sizes.count(-1) <= 1:
            _reshape_to(file, operator, sizes)


def _reshape_to(file: File, operator: Any, sizes: list[int]) -> None:
    operator.inputs = [int(operator.inputs[0]), file.add_constant(np.asarray(sizes, np.int32))]
    operator.builtinOptions, operator.builtinOptionsType = None, 0


def _absorb(file: File) -> bool:
    """Move one bias or activation in front of the moves between it and its operator; whether there was one."""
    produced = {int(operator.outputs[0]): operator for operator in file.operators}
    readers: dict[int, int] = dict.fromkeys(file.outputs, 2)  # a marked value must stay
    for operator in file.operators:
        for index in map(int, operator.inputs):
            readers[index] = readers.get(index, 0) + 1
    for late in file.operators:
        name = file.operator_name(late)
        places = [int(i) for i in late.inputs if file.constant(int(i)) is None]
        if name not in ("ADD", *_ACTIVATIONS) or len(places) != 1:
            continue
        path = _path(file, places[0], produced, readers)
        if path is None or not (_take_bias(file, path[0], late) if name == "ADD" else _take_activation(path[0], name)):
            continue
        path[-1].outputs = [int(late.outputs[0])]
        file.operators = [operator for operator in file.operators if operator is not late]
        return True
    return False


def _path(file: File, index: int, produced: dict[int, Any], readers: dict[int, int]) -> list[Any] | None:
    """The operators from the one with weights to the one that writes `index`, if all they write is read once."""
    path: list[Any] = []
    while True:
        operator = produced.get(index)
        if operator is None or readers.get(index) != 1:
            return None
        path.insert(0, operator)
        name = file.operator_name(operator)
        if name in _BIAS_PLACE:
            plain = operator.builtinOptions is not None and operator.builtinOptions.fusedActivationFunction == 0
            return path if plain else None
        if name not in _MOVES or not _keeps_channels(file, operator):
            return None
        index = int(operator.inputs[0])


def _keeps_channels(file: File, operator: Any) -> bool:
    before, after = file.tensors[operator.inputs[0]], file.tensors[operator.outputs[0]]
    return before.shape is not None and after.shape is not None and int(before.shape[-1]) == int(after.shape[-1])


def _take_activation(operator: Any, name: str) -> bool:
    operator.builtinOptions.fusedActivationFunction = _ACTIVATIONS[name]
    return True


def _take_bias(file: File, operator: Any, late: Any) -> bool:
    """Give `operator` the constant that `late` adds, and its activation, if it adds one number to each channel."""
    values = next((c for i in late.inputs if (c := file.constant(int(i))) is not None), None)
    channels = int(file.tensors[operator.outputs[0]].shape[-1])
    if values is None or values.size != channels or values.shape[-1:] != (channels,):
        return False
    place = _BIAS_PLACE[file.operator_name(operator)]
    inputs = [int(index) for index in operator.inputs]
    if len(inputs) > place and inputs[place] >= 0:
        present = file.constant(inputs[place])
        if present is None or present.any():
            return False
    operator.inputs = [*inputs[:place], file.add_constant(values.reshape(-1).astype(np.float32))]
    operator.builtinOptions.fusedActivationFunction = late.builtinOptions.fusedActivationFunction
    return True
