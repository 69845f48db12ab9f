"""What a Keras model is made of: layers, shapes, parameters, multiply-accumulates and bytes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from whet.data import rows
from whet.errors import DataError, ModelError
from whet.graph.summary import LayerRow, Summary
from whet.keras.model import arrange, describe, short
from whet.keras.views import own_weights, walk

_patching = threading.Lock()
_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.DepthwiseConv1D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


def inspect(model: Any, example: Any) -> Summary:
    """Run `model` on `example` (a batch of inputs) and count; the model is unchanged.

    A row is a layer without layers inside, or one that has weights or matrix products of its own (attention); nested
    models are flattened. Parameters are all weights, batch norm's statistics too, as `count_params` counts them. MACs
    are those of convolution, dense, einsum, recurrent and attention layers, for one example.

    Raises:
        DataError: the model cannot run on `example`.
        ModelError: `model` is no keras.Model, or `example` is None.
    """
    if not isinstance(model, keras.Model):
        raise ModelError(f"inspect needs a keras.Model, got a {type(model).__name__}.")
    if example is None:
        raise ModelError("inspect needs example=, a batch of inputs to run the model on.")
    inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, arrange(model, example))
    calls: list[tuple[int, Any, Any, Any]] = []
    try:
        with _watched(calls):
            model(inputs, training=False)
    except Exception as cause:
        raise DataError(f"The model {model.name!r} cannot run on inputs of {describe(example)}: {short(cause)}") from cause
    return _summary(model, calls, max(rows(example), 1))


@contextmanager
def _watched(calls: list[tuple[int, Any, Any, Any]]) -> Iterator[None]:
    """Every call of a layer in this thread is noted as (id, arguments, keywords, outputs) while the block runs."""
    original, thread = keras.Layer.__call__, threading.get_ident()

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, *args, **kwargs)
        if threading.get_ident() == thread:
            calls.append((id(self), args, kwargs, outputs))
        return outputs

    with _patching:
        keras.Layer.__call__ = noting
        try:
            yield
        finally:
            keras.Layer.__call__ = original


def _summary(model: Any, calls: list[tuple[int, Any, Any, Any]], batch: int) -> Summary:
    layers = dict((id(layer), (path, layer)) for path, layer in walk(model))
    made: dict[int, list[tuple[Any, Any, Any]]] = {}
    for key, args, kwargs, outputs in calls:
        made.setdefault(key, []).append((args, kwargs, outputs))
    inside = _inside(layers)
    order = [key for key in made if key in layers] + [key for key in layers if key not in made]
    counted: set[int] = set()
    found, never = [], []
    for key in order:
        path, layer = layers[key]
        if key in inside:
            continue
        is_leaf = _is_leaf(layer)
        own = _weights(layer)
        if key not in made and (own or is_leaf):
            never.append(path)
        macs = sum(_macs(layer, args, kwargs, outputs) for args, kwargs, outputs in made.get(key, []))
        if own or macs or (is_leaf and key in made):
            fresh = [weight for weight in own if id(weight) not in counted]
            counted.update(id(weight) for weight in own)
            outputs = made[key][0][2] if key in made else None
            found.append(_row(path, layer, outputs, fresh, macs, batch))
    return Summary((*found, *_own_row(model, counted)), tuple(never))


def _inside(layers: dict[int, tuple[str, Any]]) -> set[int]:
    """Layers without a row of their own: recurrent cells, and attention's softmax and dropout, which its fused form skips."""
    inside: set[int] = set()
    for _, layer in layers.values():
        if isinstance(layer, (keras.layers.RNN, *_ATTENTION)):
            recurrent = isinstance(layer, keras.layers.RNN)
            inside.update(id(part) for _, part in walk(layer) if recurrent or not part.weights)
    return inside


def _is_leaf(layer: Any) -> bool:
    return isinstance(layer, keras.layers.RNN) or next(walk(layer), None) is None


def _weights(layer: Any) -> list[Any]:
    return list(layer.weights) if isinstance(layer, keras.layers.RNN) else own_weights(layer)


def _own_row(model: Any, counted: set[int]) -> list[LayerRow]:
    """Weights that the model itself holds, outside all layers."""
    rest = [weight for weight in model.weights if id(weight) not in counted]
    return [_row(model.name, model, None, rest, 0, 1)] if rest else []


def _row(path: str, layer: Any, outputs: Any, weights: list[Any], macs: int, batch: int) -> LayerRow:
    flat = [leaf for leaf in keras.tree.flatten(outputs) if hasattr(leaf, "shape")]
    shape = tuple(int(n) for n in flat[0].shape) if flat else ()
    batched: tuple[int | None, ...] = (None, *shape[1:]) if shape and shape[0] == batch else shape
    count = sum(_size(weight) for weight in weights)
    size = sum(_size(weight) * _itemsize(weight.dtype) for weight in weights)
    return LayerRow(path, type(layer).__name__, batched, count, macs, size)


def _itemsize(dtype: Any) -> int:
    name = keras.backend.standardize_dtype(dtype)
    digits = "".join(c for c in name if c.isdigit())
    return 1 if name == "bool" or name.startswith("float8") else int(digits) // 8


def _macs(layer: Any, args: Any, kwargs: Any, outputs: Any) -> int:
    """Multiply-accumulates of one call, for one example."""
    flat = [leaf for leaf in keras.tree.flatten((args, kwargs)) if hasattr(leaf, "shape")]
    if not flat:
        return 0
    given = tuple(int(n) for n in flat[0].shape)
    first = keras.tree.flatten(outputs)[0]
    got = tuple(int(n) for n in first.shape)
    if isinstance(layer, _SEPARABLE):
        places = _places(layer, got)
        return places * (_size(layer.depthwise_kernel) + _size(layer.pointwise_kernel))
    if isinstance(layer, (*_CONVOLUTIONS, keras.layers.DepthwiseConv2D)):
        return _places(layer, got) * _size(layer.kernel)
    if isinstance(layer, _TRANSPOSED):
        return _places(layer, given) * _size(layer.kernel)
    if isinstance(layer, keras.layers.Dense):
        return math.prod(given[1:-1]) * _size(layer.kernel)
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_macs(layer.equation, given, tuple(layer.kernel.shape))
    if isinstance(layer, _ATTENTION):
        return _attention_macs(layer, args, kwargs)
    if isinstance(layer, keras.layers.RNN):
        kernels = [weight for weight in layer.weights if len(weight.shape) == 2 and "kernel" in weight.name]
        return given[1] * sum(_size(weight) for weight in kernels)
    return 0


def _places(layer: Any, shape: tuple[int, ...]) -> int:
    """How many positions a tensor of `shape` has, without batch and channels."""
    return math.prod(shape[2:] if layer.data_format == "channels_first" else shape[1:-1])


def _size(weight: Any) -> int:
    return math.prod(int(n) for n in weight.shape)


def _einsum_macs(equation: str, given: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """The product of the sizes of all letters but the batch; `...` stands for all leading axes."""
    operands, _ = equation.replace(" ", "").split("->")
    left, right = operands.split(",")
    named = left.replace("...", "")
    sizes = dict(zip(named[::-1], given[::-1], strict=False)) | dict(zip(right, kernel, strict=True))
    batch = given[0]
    leading = math.prod(given[: len(given) - len(named)])
    return math.prod(sizes.values()) * leading // batch


def _attention_macs(layer: Any, args: Any, kwargs: Any) -> int:
    """`heads · T_q · T_k · (d_k + d_v)`: the scores, and the weighted sum of the values."""
    query = args[0] if args else kwargs["query"]
    value = args[1] if len(args) > 1 else kwargs.get("value", query)
    heads = getattr(layer, "num_query_heads", None) or layer.num_heads
    depth = getattr(layer, "key_dim", None) or layer.head_dim
    depth_out = getattr(layer, "value_dim", None) or depth
    return int(heads * math.prod(query.shape[1:-1]) * math.prod(value.shape[1:-1]) * (depth + depth_out))
