"""What every `keras.ops` operation does to dimensions: a table from its class name to a rule over ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from whet.graph import moves
from whet.graph.ids import Value
from whet.keras.calls import Call, Count

Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}
_POINTWISE = (
    "Add Subtract Multiply Divide TrueDivide Maximum Minimum Power Square Sqrt Rsqrt Exp Log Log1p Expm1 Negative "
    "Absolute Abs Sign Sin Cos Tanh Sigmoid Relu Relu6 LeakyRelu Elu Selu Celu Gelu Silu Mish Softplus Softsign "
    "HardSigmoid HardSilu HardTanh LogSigmoid SquarePlus SoftShrink HardShrink TanhShrink SparsePlus Threshold Clip "
    "Where Cast StopGradient Reciprocal Floor Ceil Round Rint Erf FloorDivide Mod ZerosLike OnesLike Copy LogicalAnd "
    "LogicalOr LogicalNot Greater Less Equal GreaterEqual LessEqual NotEqual"
).split()
_REDUCES = "Mean Sum Max Min Amax Amin Prod Var Std Norm Logsumexp Any All Argmax Argmin".split()


def rule_of(operation: Any) -> Rule | None:
    """The rule of an operation of Keras' own, None where there is none."""
    return RULES.get(type(operation).__name__) if type(operation).__module__.startswith("keras.") else None


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@rule(*_POINTWISE)
def _pointwise(call: Call) -> Value:
    return call.s.elementwise(*call.operands())


@rule(*_REDUCES)
def _reduces(call: Call) -> Value:
    what = type(call.op).__name__.lower()
    return call.s.reduce(call.x, call.axes(call.op.axis), bool(call.op.keepdims), what)


@rule("Softmax", "LogSoftmax", "Cumsum", "Flip", "Sort")
def _mixes(call: Call) -> Value:
    return call.s.along(call.x, call.axes(call.op.axis), type(call.op).__name__.lower())


@rule("Matmul")
def _matmul(call: Call) -> Value:
    left, right = call.operands()
    leaves = keras.tree.flatten((call.args, call.kwargs))
    held = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, keras.Variable)), None)
    return call.s.matmul(left, right, weight=held, layer=call.path)


@rule("Einsum")
def _einsum(call: Call) -> Value:
    if "." in call.op.subscripts or "->" not in call.op.subscripts:
        raise ValueError("an equation that is not followed")
    return call.s.einsum(call.op.subscripts, call.operands(), layer=call.path)


@rule("Reshape")
def _reshape(call: Call) -> Value:
    given = tuple(call.op.newshape) if isinstance(call.op.newshape, tuple | list) else (call.op.newshape,)
    free = [d for d, n in enumerate(given) if n in (-1, None)]
    made = moves.reshape(call.s, call.x, call.shape, call.name, free)

    def sizes(count: Count) -> tuple[Any, ...]:
        return tuple(n if d in free else count(axis) for d, (n, axis) in enumerate(zip(given, made, strict=True)))

    call.site("newshape", sizes)
    return made


@rule("Squeeze", "ExpandDims")
def _squeeze(call: Call) -> Value:
    made = moves.reshape(call.s, call.x, call.shape, call.name, range(len(call.shape)))
    call.reader.writable.add(call.name)
    return made


@rule("Transpose")
def _transpose(call: Call) -> Value:
    return moves.permute(call.x, call.axes(call.op.axes) if call.op.axes is not None else range(len(call.x))[::-1])


@rule("Swapaxes")
def _swapaxes(call: Call) -> Value:
    x = list(call.x)
    one, two = call.axis(call.op.axis1), call.axis(call.op.axis2)
    x[one], x[two] = x[two], x[one]
    return tuple(x)


@rule("Moveaxis")
def _moveaxis(call: Call) -> Value:
    sources, goals = call.axes(call.op.source), call.axes(call.op.destination)
    order = [d for d in range(len(call.x)) if d not in sources]
    for goal, source in sorted(zip(goals, sources, strict=True)):
        order.insert(goal, source)
    return moves.permute(call.x, order)


@rule("Concatenate")
def _concatenate(call: Call) -> Value:
    values = call.operands()
    return moves.concat(call.s, values, call.axis(call.op.axis, len(values[0])))


@rule("Stack")
def _stack(call: Call) -> Value:
    values = call.operands()
    return moves.stack(call.s, values, call.axis(call.op.axis, len(values[0]) + 1))


@rule("Split")
def _split(call: Call) -> list[Value]:
    axis, given = call.axis(call.op.axis), call.op.indices_or_sections
    if isinstance(given, int):
        return moves.chunk(call.s, call.x, given, axis, call.name)
    parts = moves.split(call.s, call.x, [shape[axis] for shape in call.shapes], axis, call.name)

    def bounds(count: Count) -> tuple[int, ...]:
        sizes = [count(part[axis]) for part in parts]
        return tuple(sum(sizes[: i + 1]) for i in range(len(sizes) - 1))

    call.site("indices_or_sections", bounds)
    return parts


@rule("GetItem")
def _get_item(call: Call) -> Value:
    key = call.args[1] if len(call.args) > 1 else call.kwargs["key"]
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (len(call.x) - len(keys) + 1)
    x, d = call.x, 0
    for one in keys:
        if isinstance(one, slice):
            start, stop, step = one.indices(len(x[d]))
            if step < 1:
                raise ValueError("a slice that runs backwards")
            x, d = moves.cut(call.s, x, d, start, max(stop, start), step, call.name), d + 1
        elif isinstance(one, int):
            x = moves.select(call.s, x, d, "an index")
        else:
            raise ValueError("an index that is no number or slice")
    return x


@rule("Pad")
def _pad(call: Call) -> Value:
    widths = tuple((int(a), int(b)) for a, b in call.op.pad_width)
    amounts = widths * len(call.x) if len(widths) == 1 else widths
    made = moves.pad(call.s, call.x, amounts, call.name, constant=call.op.mode == "constant")
    pairs = [(axis[:low], axis[len(axis) - high :]) for axis, (low, high) in zip(made, amounts, strict=True)]
    call.site("pad_width", lambda count: tuple((count(low), count(high)) for low, high in pairs))
    return made


@rule("BroadcastTo")
def _broadcast_to(call: Call) -> Value:
    return moves.expand(call.s, call.x, call.shape, call.name)


@rule("Repeat")
def _repeat(call: Call) -> Value:
    if not isinstance(call.op.repeats, int) or call.op.axis is None:
        raise ValueError("repeats that vary")
    return moves.repeat_each(call.x, call.op.repeats, call.axis(call.op.axis))


@rule("Tile")
def _tile(call: Call) -> Value:
    times = call.op.repeats if isinstance(call.op.repeats, tuple | list) else (call.op.repeats,)
    if len(times) != len(call.x):
        raise ValueError("new axes")
    return moves.repeat(call.x, times)
