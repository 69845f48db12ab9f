"""Awkward Keras models: `CASES` maps a name to a builder of (model, a batch of inputs). Weights are random but fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

BATCH = 5
IMAGE = (8, 8, 3)
Case = tuple[keras.Model, Any]


def images(*shape: int, seed: int = 0, count: int = BATCH) -> np.ndarray:
    """Standard normal float32 inputs."""
    return np.random.default_rng(seed).standard_normal((count, *(shape or IMAGE))).astype(np.float32)


def randomize(model: keras.Model, seed: int = 0) -> keras.Model:
    """Weights of a trained model's size, biases and batch-norm statistics away from their initial values."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        name, shape = variable.path.rsplit("/", 1)[-1], tuple(variable.shape)
        if variable.dtype != "float32":
            continue
        if name == "moving_variance":
            variable.assign(rng.uniform(0.5, 2.0, shape))
        elif name == "gamma":
            variable.assign(rng.uniform(0.5, 1.5, shape))
        elif len(shape) < 2:
            variable.assign(rng.normal(0.0, 0.3, shape))
        else:
            variable.assign(rng.normal(0.0, 1.5 / np.sqrt(np.prod(shape[:-1])), shape))
    return model


def _finish(inputs: Any, x: Any, name: str, data: Any = None) -> Case:
    """Pool, classify into 7, and randomize."""
    x = L.GlobalAveragePooling2D()(x) if len(x.shape) == 4 else x
    model = keras.Model(inputs, L.Dense(7, name="classifier")(x), name=name)
    return randomize(model), images() if data is None else data


def digits_cnn() -> Case:
    """The demo's network in NHWC."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.Conv2D(10, 3, name="conv1"),
            L.ReLU(),
            L.Conv2D(20, 3, name="conv2"),
            L.ReLU(),
            L.Flatten(),
            L.Dense(50, name="hidden"),
            L.ReLU(),
            L.Dense(10, name="logits"),
        ],
        name="digits_cnn",
    )
    return randomize(model), images(8, 8, 1)


def residual_add() -> Case:
    """Convolutions with batch norm, one shortcut by layer and one by operator."""
    i = keras.Input(IMAGE)
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, padding="same", use_bias=False)(i)))
    y = L.BatchNormalization()(L.Conv2D(8, 3, padding="same")(x))
    x = L.ReLU()(L.Add()([x, y]))
    y = L.Conv2D(8, 3, padding="same", activation="relu")(x)
    return _finish(i, x + y, "residual_add")


def small_resnet() -> Case:
    """Add, concat, depthwise, max pool, global average pool, softmax."""
    i = keras.Input((16, 16, 3))
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, padding="same", use_bias=False)(i)))
    y = L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    y = L.ReLU(max_value=6)(L.BatchNormalization()(y))
    y = L.BatchNormalization()(L.Conv2D(8, 1, use_bias=False)(y))
    x = L.MaxPooling2D()(L.ReLU()(L.Add()([x, y])))
    z = L.Conv2D(12, 3, padding="same", activation="relu")(x)
    x = L.Concatenate()([x, z])
    x = L.Conv2D(16, 3, strides=2, padding="same", activation="relu")(x)
    x = L.GlobalAveragePooling2D()(x)
    model = keras.Model(i, L.Softmax()(L.Dense(10)(x)), name="small_resnet")
    return randomize(model), images(16, 16, 3)


def concat_same() -> Case:
    """`concat([x, x])`."""
    i = keras.Input(IMAGE)
    x = L.Conv2D(6, 3, activation="relu")(i)
    return _finish(i, L.Conv2D(8, 1)(L.Concatenate()([x, x])), "concat_same")


def concat_widths() -> Case:
    """Branches of different widths, one of them pooled."""
    i = keras.Input(IMAGE)
    x = L.Conv2D(6, 3, padding="same", activation="relu")(i)
    y = L.Conv2D(5, 1)(i)
    x = L.Concatenate()([x, y, L.AveragePooling2D(2, strides=1, padding="same")(x)])
    return _finish(i, L.Conv2D(8, 3)(x), "concat_widths")


def depthwise() -> Case:
    """Depthwise with multiplier 1 and 2, and a separable convolution."""
    i = keras.Input(IMAGE)
    x = L.Conv2D(6, 1, activation="relu")(i)
    x = L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same")(x))
    x = L.BatchNormalization()(L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(x))
    return _finish(i, L.SeparableConv2D(9, 3, depth_multiplier=2, activation="relu")(x), "depthwise")


def grouped() -> Case:
    """A grouped convolution and group normalization."""
    i = keras.Input(IMAGE)
    x = L.Conv2D(24, 3, activation="relu")(i)
    x = L.ReLU()(L.GroupNormalization(8)(x))
    return _finish(i, L.Conv2D(12, 3, groups=3)(x), "grouped")


def channel_shuffle() -> Case:
    """Reshape, permute, reshape over channels."""
    i = keras.Input(IMAGE)
    x = L.Conv2D(8, 3, activation="relu")(i)
    x = L.Reshape((6, 6, 2, 4))(x)
    x = L.Reshape((6, 6, 8))(L.Permute((1, 2, 4, 3))(x))
    return _finish(i, L.Conv2D(8, 3)(x), "channel_shuffle")


def permute_flatten() -> Case:
    """Channels first before flattening into a dense layer."""
    i = keras.Input(IMAGE)
    x = L.Conv2D(4, 3, activation="relu")(i)
    return _finish(i, L.Flatten()(L.Permute((3, 1, 2))(x)), "permute_flatten")


def pixel_shuffle() -> Case:
    """Depth to space, and a gate over two halves."""
    i = keras.Input(IMAGE)
    x = L.Conv2D(8, 3, padding="same", activation="relu")(i)
    x = ops.reshape(x, (-1, 8, 8, 2, 2, 2))
    x = ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, 16, 16, 2))
    a, b = ops.split(L.Conv2D(8, 3)(x), 2, axis=-1)
    return _finish(i, a * ops.sigmoid(b), "pixel_shuffle")


def dense_reshape_transposed() -> Case:
    """A decoder: dense, reshape, transposed convolution."""
    i = keras.Input((10,))
    x = L.Reshape((4, 4, 6))(L.Dense(96, activation="relu")(i))
    x = L.Conv2DTranspose(5, 3, strides=2, padding="same", activation="relu")(x)
    return _finish(i, x, "dense_reshape_transposed", images(10))


def fused_qkv() -> Case:
    """Attention with one projection for queries, keys and values, taken apart by index."""
    i = keras.Input((6, 8))
    qkv = ops.transpose(ops.reshape(L.Dense(24, name="qkv")(i), (-1, 6, 3, 2, 4)), (2, 0, 3, 1, 4))
    q, k, v = qkv[0], qkv[1], qkv[2]
    weights = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / 2.0)
    x = ops.reshape(ops.transpose(ops.matmul(weights, v), (0, 2, 1, 3)), (-1, 6, 8))
    x = L.Dense(8, name="projection")(x) + i
    model = keras.Model(i, L.Dense(7)(L.GlobalAveragePooling1D()(x)), name="fused_qkv")
    return randomize(model), images(6, 8)


def attention_layer() -> Case:
    """Keras' own multi-head attention between dense layers."""
    i = keras.Input((6, 8))
    x = L.Dense(8, activation="relu", name="before")(i)
    x = L.LayerNormalization()(x + L.MultiHeadAttention(2, 4, name="attention")(x, x))
    return _finish(i, L.GlobalAveragePooling1D()(L.Dense(9, name="after")(x)), "attention_layer", images(6, 8))


def nested_sequential() -> Case:
    """A Sequential in a Functional model, its layers named as layers outside."""
    i = keras.Input(IMAGE)
    inner = keras.Sequential([L.Conv2D(6, 3, name="conv"), L.BatchNormalization(), L.ReLU()], name="inner")
    x = inner(L.Conv2D(4, 3, activation="relu", name="conv")(i))
    return _finish(i, x, "nested_sequential")


def nested_functional() -> Case:
    """Functional in Sequential in Functional, the innermost with a shortcut and two inputs."""
    a, b = keras.Input((6, 6, 4)), keras.Input((6, 6, 4))
    block = keras.Model([a, b], L.ReLU()(L.Conv2D(4, 1, name="conv")(a) + b), name="block")
    i = keras.Input(IMAGE)
    x = L.Conv2D(4, 3, name="conv")(i)
    j = keras.Input((6, 6, 4))
    outer = keras.Sequential([keras.Model(j, block([j, j]), name="wrapped"), L.MaxPooling2D()], name="outer")
    return _finish(i, outer(x), "nested_functional")


def shared_layer() -> Case:
    """One convolution called twice, on different values: one weight, one value for each call."""
    i = keras.Input(IMAGE)
    conv = L.Conv2D(3, 3, padding="same", name="shared")
    x = conv(L.ReLU()(conv(i)))
    return _finish(i, x, "shared_layer")


def several_outputs() -> Case:
    """Two inputs by name, a dict of outputs, one of which is read inside the model too."""
    a, b = keras.Input(IMAGE, name="image"), keras.Input((4,), name="extra")
    x = L.GlobalAveragePooling2D()(L.Conv2D(6, 3, activation="relu")(a))
    y = L.Dense(6, activation="tanh")(b)
    joined = L.Concatenate()([x, y])
    score = L.Dense(7, name="score")(joined)
    outputs = {"score": score, "probability": L.Softmax()(score), "features": joined}
    model = keras.Model({"image": a, "extra": b}, outputs, name="several_outputs")
    return randomize(model), {"image": images(), "extra": images(4, seed=1)}


def one_dimensional() -> Case:
    """Conv1D, its pools, and a dense layer over three axes."""
    i = keras.Input((16, 4))
    x = L.MaxPooling1D()(L.Conv1D(6, 3, padding="same", activation="relu")(i))
    x = L.Dense(5, activation="relu")(x)
    return _finish(i, L.GlobalAveragePooling1D()(L.Conv1D(6, 3)(x)), "one_dimensional", images(16, 4))


def padded_and_dilated() -> Case:
    """ZeroPadding, strides, dilation, SAME padding, a gate and a sum of three."""
    i = keras.Input((12, 12, 3))
    x = L.Conv2D(6, 3, strides=2, activation="relu")(L.ZeroPadding2D(1)(i))
    y = L.Conv2D(6, 3, dilation_rate=2, padding="same", activation="relu")(x)
    gate = L.Dense(6, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(y))
    return _finish(i, L.Add()([x, y, L.Multiply()([y, gate])]), "padded_and_dilated", images(12, 12, 3))


CASES: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (
        digits_cnn,
        residual_add,
        small_resnet,
        concat_same,
        concat_widths,
        depthwise,
        grouped,
        channel_shuffle,
        permute_flatten,
        pixel_shuffle,
        dense_reshape_transposed,
        fused_qkv,
        attention_layer,
        nested_sequential,
        nested_functional,
        shared_layer,
        several_outputs,
        one_dimensional,
        padded_and_dilated,
    )
}
