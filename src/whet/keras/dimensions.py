"""What every Keras layer does to dimensions: a table from its class to a rule over ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from whet.graph import moves
from whet.graph.ids import Value
from whet.graph.structure import SPATIAL
from whet.keras.calls import Call, Count

L = keras.layers
Rule = Callable[[Call], Any]
RULES: dict[type, Rule] = {}
POINTWISE = set(
    "relu relu6 leaky_relu elu selu silu swish gelu sigmoid tanh softplus softsign exponential hard_sigmoid hard_silu "
    "hard_swish hard_tanh mish linear celu log_sigmoid squareplus soft_shrink hard_shrink tanh_shrink sparse_plus "
    "threshold".split()
)
_SAME = (
    *(L.Dropout, L.SpatialDropout1D, L.SpatialDropout2D, L.SpatialDropout3D, L.GaussianDropout, L.GaussianNoise),
    *(L.AlphaDropout, L.Identity, L.ActivityRegularization, L.ReLU, L.LeakyReLU, L.ELU),
)
_WINDOWS = (
    *(L.MaxPooling1D, L.MaxPooling2D, L.MaxPooling3D, L.AveragePooling1D, L.AveragePooling2D, L.AveragePooling3D),
    *(L.UpSampling1D, L.UpSampling2D, L.UpSampling3D, L.ZeroPadding1D, L.ZeroPadding2D, L.ZeroPadding3D),
    *(L.Cropping1D, L.Cropping2D, L.Cropping3D),
)
_GLOBAL = (
    *(L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D),
    *(L.GlobalAveragePooling1D, L.GlobalAveragePooling2D, L.GlobalAveragePooling3D),
)
_OVERRIDES = {"call", "__call__", "build", "kernel", "bias", "activation", "convolution_op"}


def rule_of(layer: Any) -> Rule | None:
    """The rule of a layer's class; of a class derived from Keras' own if it computes the same."""
    if getattr(layer, "lora_enabled", False):
        return None
    if type(layer).__module__ == "keras.src.applications.convnext":
        return {"LayerScale": _layer_scale, "StochasticDepth": _same}.get(type(layer).__name__)
    for cls in type(layer).__mro__:
        if cls in RULES:
            return RULES[cls]
        if not cls.__module__.startswith("keras.") and _OVERRIDES & set(vars(cls)):
            return None
    return None


def rule(*classes: type) -> Callable[[Rule], Rule]:
    """Register a rule for layers of these classes."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(classes, function))
        return function

    return register


def _required(call: Call, attribute: str, layer: Any = None) -> Value:
    found = call.weight(attribute, layer)
    if found is None:
        raise ValueError(f"no {attribute}")
    return found


def _is_first(call: Call) -> bool:
    return str(getattr(call.op, "data_format", "channels_last")) == "channels_first"


def _front(call: Call, x: Value) -> Value:
    """Channels in the second place, as the structure's operations take them."""
    return x if _is_first(call) else (x[0], x[-1], *x[1:-1])


def _back(call: Call, x: Value) -> Value:
    return x if _is_first(call) else (x[0], *x[2:], x[1])


def _spatial(call: Call) -> tuple[int, ...]:
    return call.shape[2:] if _is_first(call) else call.shape[1:-1]


def _takes(call: Call, axis: int) -> None:
    """The layer's input_spec names the size of `axis` of its input, counted from the front or from the back."""
    x = call.x
    both = (axis % len(x), axis % len(x) - len(x))
    call.edit("input_spec", lambda count: {str(a): count(x[axis]) for a in both})


def activated(call: Call, value: Value) -> Value:
    """`value` behind the layer's activation."""
    activation = getattr(call.op, "activation", None)
    if activation is None:
        return value
    if isinstance(activation, L.Softmax):
        return call.s.along(value, [activation.axis % len(value)], "softmax")
    if isinstance(activation, _SAME):
        return value
    if isinstance(activation, L.Activation):
        activation = activation.activation
    name = str(getattr(activation, "__name__", type(activation).__name__))
    own = getattr(keras.activations, name, None)
    if activation is own and name in ("softmax", "log_softmax"):
        return call.s.along(value, [len(value) - 1], name)
    if activation is not own or name not in POINTWISE:
        call.s.fix(value, f"the activation {name} of {call.path} cannot be followed")
    return value


@rule(L.Conv1D, L.Conv2D, L.Conv3D)
def _conv(call: Call) -> Value:
    kernel, bias = _required(call, "kernel"), call.weight("bias")
    x, weight, groups = _front(call, call.x), (kernel[-1], kernel[-2], *kernel[:-2]), call.op.groups
    made = call.s.conv(x, weight, bias, _spatial(call), groups=groups, layer=call.path, name=call.name)
    call.edit("filters", lambda count: count(kernel[-1]))
    if groups > 1:
        call.site("groups", lambda count: count(x[1]) // max(count(kernel[-2]), 1))
    _takes(call, 1 if _is_first(call) else len(x) - 1)
    return activated(call, _back(call, made))


@rule(L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)
def _conv_transpose(call: Call) -> Value:
    kernel, bias = _required(call, "kernel"), call.weight("bias")
    x, weight = _front(call, call.x), (kernel[-1], kernel[-2], *kernel[:-2])
    made = call.s.conv_transpose(x, weight, bias, _spatial(call), layer=call.path, name=call.name)
    call.edit("filters", lambda count: count(kernel[-2]))
    _takes(call, 1 if _is_first(call) else len(x) - 1)
    return activated(call, _back(call, made))


def _depth(call: Call, kernel: Value, bias: Value | None) -> Value:
    """A depthwise convolution, channels in the second place: kernel (…, C, multiplier), output channel c·multiplier + m."""
    x = _front(call, call.x)
    call.s.fix(x, SPATIAL, range(2, len(x)))
    call.s.fix(kernel, "a kernel axis", range(len(kernel) - 2))
    call.s.fix(kernel, "the multiplier of a depthwise convolution", [len(kernel) - 1])
    call.s.ids.unite(x[1], kernel[-2])
    many = len(kernel[-1])
    out = kernel[-2] if many == 1 else call.s.ids.fresh(len(x[1]) * many)
    if many > 1:
        call.s.ids.link(out, (kernel[-2], kernel[-1]))
    if bias is not None:
        call.s.ids.unite(out, bias[0])
    _takes(call, 1 if _is_first(call) else len(x) - 1)
    return (x[0], out, *call.s.fresh(_spatial(call), SPATIAL))


@rule(L.DepthwiseConv1D, L.DepthwiseConv2D)
def _depthwise(call: Call) -> Value:
    kernel = _required(call, "kernel")
    made = _depth(call, kernel, call.weight("bias"))
    call.s._count(call.path, (len(call.x[0]), *_spatial(call), *map(len, kernel[:-2])), (kernel[-2], kernel[-1]))
    return activated(call, _back(call, made))


@rule(L.SeparableConv1D, L.SeparableConv2D)
def _separable(call: Call) -> Value:
    depth, point, bias = _required(call, "depthwise_kernel"), _required(call, "pointwise_kernel"), call.weight("bias")
    middle = _depth(call, depth, None)
    call.s._count(call.path, (len(call.x[0]), *_spatial(call), *map(len, depth[:-2])), (depth[-2], depth[-1]))
    weight = (point[-1], point[-2], *point[:-2])
    made = call.s.conv(middle, weight, bias, _spatial(call), layer=call.path, name=call.name)
    call.edit("filters", lambda count: count(point[-1]))
    return activated(call, _back(call, made))


@rule(L.Dense)
def _dense(call: Call) -> Value:
    kernel, bias = _required(call, "kernel"), call.weight("bias")
    made = call.s.linear(call.x, (kernel[1], kernel[0]), bias, layer=call.path)
    call.edit("units", lambda count: count(kernel[1]))
    _takes(call, -1)
    return activated(call, made)


@rule(L.EinsumDense)
def _einsum_dense(call: Call) -> Value:
    made = _product(call, call.op, call.x, call.path)

    def sizes(count: Count) -> tuple[int | None, ...]:
        given = call.op.partial_output_shape
        back = made[len(made) - len(given) :]
        return tuple(n if n is None or len(axis) != n else count(axis) for n, axis in zip(given, back, strict=True))

    call.edit("partial_output_shape", sizes)
    return activated(call, made)


def _product(call: Call, layer: Any, x: Value, path: str) -> Value:
    """An EinsumDense on `x`, without its activation."""
    inputs, _, output = layer.equation.replace(" ", "").partition("->")
    left, right = inputs.split(",")
    if "..." in left:
        extra = len(x) - len(left.replace("...", ""))
        free = [chr(n) for n in (*range(65, 91), *range(97, 123)) if chr(n) not in layer.equation][:extra]
        left, output = left.replace("...", "".join(free)), output.replace("...", "".join(free))
    kernel, bias = _required(call, "kernel", layer), call.weight("bias", layer)
    made = call.s.einsum(f"{left},{right}->{output}", (x, kernel), weight=1, layer=path)
    return made if bias is None else call.s.elementwise(made, bias)


@rule(L.MultiHeadAttention, L.GroupQueryAttention)
def _attention(call: Call) -> Value:
    given = [a for a in call.args if a is not None] + [call.kwargs[k] for k in ("query", "value", "key") if k in call.kwargs]
    grouped = isinstance(call.op, L.GroupQueryAttention)
    if len(call.shapes) > 1 or getattr(call.op, "_use_gate", getattr(call.op, "use_gate", False)) or len(given) > 3:
        raise ValueError("attention scores or a gate")
    found = [call.value(leaf) for leaf in given]
    query = found[0]
    value = found[1] if len(found) > 1 else query
    key = found[2] if len(found) > 2 else value
    if query is None or value is None or key is None or len(query) != 3:
        raise ValueError("attention over several axes")
    layers = {name: getattr(call.op, f"_{name}_dense") for name in ("query", "key", "value", "output")}
    sources = {"query": query, "key": key, "value": value}
    q, k, v = (_product(call, layers[n], x, f"{call.path}/{n}") for n, x in sources.items())
    mixed = call.s.attention(*((t[0], t[2], t[1], t[3]) for t in (q, k, v)), layer=call.path)
    for t in (k, v):
        call.s.fix(t, "the size of an attention head", [3])
    call.s.fix(mixed, "the size of an attention head", [3])
    made = _product(call, layers["output"], (mixed[0], mixed[2], mixed[1], mixed[3]), f"{call.path}/attention_output")
    if grouped or call.op._output_shape is None:
        call.s.ids.unite(made[-1], query[-1])
    else:
        call.edit("_output_shape", lambda count: (count(made[-1]),))
    if grouped:
        call.edit("num_query_heads", lambda count: count(q[2]))
        call.edit("num_key_value_heads", lambda count: count(k[2]))
    else:
        call.edit("_num_heads", lambda count: count(q[2]))
    return made


@rule(L.BatchNormalization)
def _batch_norm(call: Call) -> Value:
    axis = call.axis(call.op.axis)
    vectors = [call.weight(name) for name in ("gamma", "beta", "moving_mean", "moving_variance")]
    _takes(call, axis)
    return call.s.channel_norm(call.x, *vectors, axis=axis)


@rule(L.LayerNormalization, L.RMSNormalization)
def _layer_norm(call: Call) -> Value:
    axes = sorted(call.axes(call.op.axis))
    if axes != list(range(axes[0], len(call.x))):
        raise ValueError("a norm over inner axes")
    held = [name for name in ("gamma", "beta", "scale") if isinstance(getattr(call.op, name, None), keras.Variable)]
    return call.s.layer_norm(call.x, len(axes), *(call.weight(name) for name in held))


@rule(L.GroupNormalization)
def _group_norm(call: Call) -> Value:
    axis, groups, x = call.axis(call.op.axis), int(call.op.groups), call.x
    width = len(x[axis]) // groups
    made = call.s.group_norm(x, groups, call.weight("gamma"), call.weight("beta"), axis=axis, name=call.name)
    call.site("groups", lambda count: count(x[axis]) // width)
    _takes(call, axis)
    return made


@rule(L.UnitNormalization)
def _unit_norm(call: Call) -> Value:
    return call.s.along(call.x, call.axes(call.op.axis), "a unit norm")


@rule(L.PReLU)
def _prelu(call: Call) -> Value:
    for axis in range(1, len(call.x)):
        if axis not in (call.op.shared_axes or ()):
            _takes(call, axis)
    return call.s.elementwise(call.x, _required(call, "alpha"))


def _layer_scale(call: Call) -> Value:
    gamma = _required(call, "gamma")
    call.edit("projection_dim", lambda count: count(gamma[0]))
    return call.s.elementwise(call.x, gamma)


@rule(L.Rescaling)
def _rescaling(call: Call) -> Value:
    if np.ndim(call.op.scale) or np.ndim(call.op.offset):
        raise ValueError("a scale for each channel")
    return call.x


@rule(L.Activation)
def _activation(call: Call) -> Value:
    return activated(call, call.x)


@rule(L.Softmax)
def _softmax(call: Call) -> Value:
    return call.s.along(call.x, call.axes(call.op.axis), "softmax")


@rule(L.Add, L.Subtract, L.Multiply, L.Average, L.Maximum, L.Minimum)
def _merge(call: Call) -> Value:
    if len({len(value) for value in call.inputs}) > 1:
        raise ValueError("tensors of several ranks")
    return call.s.elementwise(*call.inputs)


@rule(L.Concatenate)
def _concatenate(call: Call) -> Value:
    return moves.concat(call.s, call.inputs, call.axis(call.op.axis))


@rule(L.Flatten)
def _flatten(call: Call) -> Value:
    x = (call.x[0], *call.x[2:], call.x[1]) if _is_first(call) and len(call.x) > 2 else call.x
    made = moves.reshape(call.s, x, call.shape, call.name, range(2))
    call.reader.writable.add(call.name)
    return made


@rule(L.Reshape)
def _reshape(call: Call) -> Value:
    target = call.op.target_shape
    free = [0, *(d + 1 for d, n in enumerate(target) if n == -1)]
    made = moves.reshape(call.s, call.x, call.shape, call.name, free)
    call.site("target_shape", lambda count: tuple(n if n == -1 else count(a) for n, a in zip(target, made[1:], strict=True)))
    return made


@rule(L.Permute)
def _permute(call: Call) -> Value:
    return moves.permute(call.x, (0, *call.op.dims))


@rule(L.RepeatVector)
def _repeat_vector(call: Call) -> Value:
    return (call.x[0], call.s.ids.fresh(call.op.n, "a repeated axis"), call.x[1])


@rule(L.Embedding)
def _embedding(call: Call) -> Value:
    table = _required(call, "embeddings")
    call.edit("output_dim", lambda count: count(table[1]))
    return call.s.take(table, 0, [len(axis) for axis in call.x])


def _same(call: Call) -> Value:
    return call.x


def _window(call: Call) -> Value:
    x = _front(call, call.x)
    return _back(call, call.s.window(x, (*map(len, x[:2]), *_spatial(call)), len(x) - 2))


def _global(call: Call) -> Value:
    x = _front(call, call.x)
    made = call.s.reduce(x, range(2, len(x)), bool(call.op.keepdims), "a mean or maximum")
    return _back(call, made) if call.op.keepdims else made


RULES.update(dict.fromkeys(_SAME, _same) | dict.fromkeys(_WINDOWS, _window) | dict.fromkeys(_GLOBAL, _global))
