"""What a converter of channels-first models leaves to do in a .tflite file: needless transposes, and the batch.

The converter is given one batch size at a time. Two files of two sizes show which sizes are the batch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from whet.errors import ExportError
from whet.formats.tflite import Array, File

_ALIKE = {"ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "RELU", "RELU6", "LOGISTIC", "TANH", "HARD_SWISH", "GELU", "ABS"}
_LAST = 2**31 - 1  # a slice's end beyond any axis
_COMPUTED = {"BROADCAST_TO": 1, "TRANSPOSE_CONV": 0}  # operators -> the input that must hold every size
_SHAPES = {"RESHAPE": 1, "SLICE": 2, "STRIDED_SLICE": 2}  # operators -> the input with sizes that may follow the batch


def tidy_transposes(file: File) -> None:
    """Move transposes behind operations that do not mind, and take out those that undo each other; results stay as they are."""
    _cancel(file)
    for _ in range(len(file.operators)):
        produced = {int(operator.outputs[0]): operator for operator in file.operators}
        if not any(_sink(file, operator, produced) for operator in list(file.operators)):
            return
        _cancel(file)


def _sink(file: File, operator: Any, produced: dict[int, Any]) -> bool:
    """Let `operator` read what was there before the transposes that it reads, and transpose its result; whether it did."""
    name = file.operator_name(operator)
    inputs = [int(index) for index in operator.inputs]
    data = [index for index in inputs if index >= 0 and file.constant(index) is None]
    turned = [produced.get(index) for index in data]
    if not data or len(operator.outputs) != 1 or any(t is None or file.operator_name(t) != "TRANSPOSE" for t in turned):
        return False
    orders = [file.constant(int(transpose.inputs[1])) for transpose in turned if transpose is not None]
    order = orders[0]
    if order is None or any(other is None or not np.array_equal(order, other) for other in orders):
        return False
    constants = {place: value for place, i in enumerate(inputs) if i >= 0 and (value := file.constant(i)) is not None}
    options = operator.builtinOptions
    if name in _ALIKE and all(value.size == 1 for value in constants.values()):
        replaced: dict[int, Array] = {}
    elif name == "PAD" and set(constants) == {1}:
        replaced = {1: _placed(constants[1], order)}
    elif name == "STRIDED_SLICE" and set(constants) == {1, 2, 3} and len(constants[1]) == len(order) and _plain(options):
        replaced = {place: _placed(value, order) for place, value in constants.items()}
        options.beginMask, options.endMask = _bits(options.beginMask, order), _bits(options.endMask, order)
    elif name == "MEAN" and set(constants) == {1}:
        return _sink_mean(file, operator, order, constants[1], turned)
    elif name == "CONCATENATION" and not constants:
        replaced, options.axis = {}, int(order[options.axis % len(order)])
    else:
        return False
    sources = iter([int(transpose.inputs[0]) for transpose in turned if transpose is not None])
    moved = [index if place in constants or index < 0 else next(sources) for place, index in enumerate(inputs)]
    operator.inputs = [file.add_constant(replaced[p]) if p in replaced else index for p, index in enumerate(moved)]
    result = int(operator.outputs[0])
    made = file.add_like(result, file.dtype(result))
    tensor = file.tensors[made]
    tensor.shape = _placed(np.asarray(tensor.shape), order).tolist()
    if tensor.shapeSignature is not None:
        tensor.shapeSignature = _placed(np.asarray(tensor.shapeSignature), order).tolist()
    operator.outputs = [made]
    turn = file.add_operator("TRANSPOSE", [made, file.add_constant(order)], [result])
    file.operators.insert(file.operators.index(operator) + 1, turn)
    return True


def _sink_mean(file: File, operator: Any, order: Array, axes: Array, turned: list[Any]) -> bool:
    """A mean whose result has no transposed axes: those that are left are in one order before and after."""
    averaged = {int(axis) % len(order) for axis in axes.reshape(-1)}
    left = [int(order[axis]) for axis in range(len(order)) if axis not in averaged]
    if operator.builtinOptions.keepDims or left != sorted(left):
        return False
    before = np.asarray(sorted(int(order[axis]) for axis in averaged), np.int32)
    operator.inputs = [int(turned[0].inputs[0]), file.add_constant(before)]
    return True


def _placed(array: Array, order: Array) -> Array:
    """Rows of a transpose's result in the order of its source: axis k of the result is axis `order[k]` there."""
    return array[np.argsort(order, kind="stable")]


def _plain(options: Any) -> bool:
    return not (options.ellipsisMask or options.newAxisMask or options.shrinkAxisMask or options.offset)


def _bits(mask: int, order: Array) -> int:
    return sum(1 << int(order[axis]) for axis in range(len(order)) if mask >> axis & 1)


def _cancel(file: File) -> None:
    """Let what reads a transpose that undoes another read what was there before; outputs stay as they are."""
    produced = {int(operator.outputs[0]): operator for operator in file.operators}
    for operator in file.operators:
        operator.inputs = [_untransposed(file, int(index), produced) for index in operator.inputs]
    needed = set(file.outputs)
    for operator in reversed(file.operators):
        if any(int(index) in needed for index in operator.outputs):
            needed.update(int(index) for index in operator.inputs)
    file.operators = [o for o in file.operators if any(int(index) in needed for index in o.outputs)]


def _untransposed(file: File, index: int, produced: dict[int, Any]) -> int:
    late = produced.get(index)
    early = None if late is None else produced.get(int(late.inputs[0]))
    if late is None or early is None or {file.operator_name(late), file.operator_name(early)} != {"TRANSPOSE"}:
        return index
    first, second = file.constant(int(early.inputs[1])), file.constant(int(late.inputs[1]))
    if first is None or second is None or not np.array_equal(first[second], np.arange(len(first))):
        return index
    return _untransposed(file, int(early.inputs[0]), produced)


def before_layout(file: File, index: int) -> int:
    """The tensor that the converter turned into `index`: the value as the operators around it have it.

    Before transposes, and before the reshape behind a dense layer over three axes, whose operator has two.
    """
    produced = {int(operator.outputs[0]): operator for operator in file.operators}

    def before(index: int, name: str) -> int:
        while index in produced and file.operator_name(produced[index]) == name:
            index = int(produced[index].inputs[0])
        return index

    dense = before(index, "RESHAPE")
    if dense in produced and file.operator_name(produced[dense]) == "FULLY_CONNECTED":
        return dense
    return before(index, "TRANSPOSE")


def open_batch(file: File, other: File, size: int, other_size: int) -> None:
    """Let the batch axis of `file`, converted for batches of `size`, take any size; `other` is the same for `other_size`.

    Raises:
        ExportError: the two differ in more than sizes, or a size is fixed in an operator.
    """

    def same(one: list[Any], another: list[Any]) -> bool:
        return [file.operator_name(a) for a in one] == [other.operator_name(b) for b in another]

    if not same(file.operators, other.operators) or len(file.tensors) != len(other.tensors):
        raise ExportError(
            "The converter made other operations for another batch size, so that no file takes both. Export with "
            "dynamic=False for batches of the example's size."
        )
    for index in {*file.inputs, *(int(i) for operator in file.operators for i in operator.outputs)}:
        _open_tensor(file.tensors[index], other.tensors[index], size, other_size)
    made: list[Any] = []
    for operator, twin in zip(file.operators, other.operators, strict=True):
        _open_operator(file, operator, [other.constant(int(i)) if i >= 0 else None for i in twin.inputs], size, made)
    file.operators = [*made, *file.operators]


def _open_operator(file: File, operator: Any, others: list[Array | None], size: int, made: list[Any]) -> None:
    """Give an operator whose constants hold the batch size ones that do not, or that are computed, by what is put in `made`."""
    name = file.operator_name(operator)
    inputs = [int(index) for index in operator.inputs]
    for place, (index, another) in enumerate(zip(inputs, others, strict=True)):
        mine = file.constant(index) if index >= 0 else None
        if mine is None or another is None or (mine.shape == another.shape and np.array_equal(mine, another)):
            continue
        free = mine != another if mine.shape == another.shape else None
        if free is not None and _COMPUTED.get(name) == place and int(free.sum()) == 1 and int(mine[free][0]) == size:
            inputs[place] = _computed(file, mine, int(np.argmax(free)), made)
            continue
        if free is None or _SHAPES.get(name) != place or (name == "RESHAPE" and int(free.sum()) != 1):
            raise ExportError(
                f"The converter wrote the batch size into the constants of {name}, so that the file takes no other. Export "
                "with dynamic=False for batches of the example's size."
            )
        opened = np.where(free, _LAST if name == "STRIDED_SLICE" else -1, mine).astype(mine.dtype)
        inputs[place] = file.add_constant(opened)
        if name == "RESHAPE":
            operator.builtinOptions, operator.builtinOptionsType = None, 0
    operator.inputs = inputs


def _computed(file: File, shape: Array, place: int, made: list[Any]) -> int:
    """`shape` with the batch size of the file's first input at `place`, computed when the file runs."""
    kinds, int32 = file.schema, file.schema.TensorType.INT32

    def vector(name: str, inputs: list[int], length: int, kind: str, **options: Any) -> int:
        file.tensors.append(kinds.TensorT(shape=[length], type=int32, buffer=0, name=b""))
        operator = file.add_operator(name, inputs, [len(file.tensors) - 1])
        operator.builtinOptionsType = getattr(kinds.BuiltinOptions, kind)
        operator.builtinOptions = getattr(kinds, f"{kind}T")(**options)
        made.append(operator)
        return len(file.tensors) - 1

    source = file.inputs[0]
    whole = vector("SHAPE", [source], len(file.tensors[source].shape), "ShapeOptions", outType=int32)
    ends = [file.add_constant(np.asarray([value], np.int32)) for value in (0, 1, 1)]
    batch = vector("STRIDED_SLICE", [whole, *ends], 1, "StridedSliceOptions")
    parts = [shape[:place], shape[place + 1 :]]
    before, after = ([file.add_constant(part.astype(np.int32))] if len(part) else [] for part in parts)
    return vector("CONCATENATION", [*before, batch, *after], len(shape), "ConcatenationOptions", axis=0)


def _open_tensor(tensor: Any, twin: Any, size: int, other_size: int) -> None:
    shape = [] if tensor.shape is None else [int(n) for n in tensor.shape]
    another = [] if twin.shape is None else [int(n) for n in twin.shape]
    free = [mine != its for mine, its in zip(shape, another, strict=True)]
    if any(is_free and mine * other_size != its * size for mine, its, is_free in zip(shape, another, free, strict=True)):
        raise ExportError(
            f"A size of {shape} becomes {another} when the batch grows from {size} to {other_size}: the batch axis cannot stay "
            "open. Export with dynamic=False for batches of the example's size."
        )
    if any(free):
        tensor.shapeSignature = [-1 if is_free else n for n, is_free in zip(shape, free, strict=True)]
        tensor.shape = [n // size if is_free else n for n, is_free in zip(shape, free, strict=True)]
