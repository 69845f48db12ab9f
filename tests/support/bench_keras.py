"""The Keras bench, on TensorFlow."""

from __future__ import annotations

from functools import cache
from typing import Any

import keras
import numpy as np
from keras import layers as L

from bench import CLASSES, Bench


def _net() -> Any:
    return keras.Sequential(
        [
            keras.Input((6, 6, 1), name="images"),
            L.Conv2D(6, 3, name="conv"),
            L.BatchNormalization(name="norm", momentum=0.7),
            L.ReLU(name="relu"),
            L.Flatten(name="flat"),
            L.Dropout(0.1, name="drop"),
            L.Dense(CLASSES, name="head"),
        ],
        name="net",
    )


@cache
def _trained() -> list[np.ndarray]:
    keras.utils.set_random_seed(0)
    model = _net()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    model.fit(*BENCH.data(256, seed=5), epochs=8, batch_size=64, verbose=0)
    return model.get_weights()


def build() -> Any:
    """Compiled, with a frozen layer and an attribute: what a user may have left in a model."""
    model = _net()
    model.set_weights(_trained())
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    model.get_layer("norm").trainable = False
    model.note = {"made by": "the user"}
    return model


def state(model: Any) -> Any:
    layers = [(layer.name, type(layer).__name__, layer.trainable, id(layer), sorted(vars(layer))) for layer in model.layers]
    variables = [(v.path, v.trainable, str(v.dtype), id(v)) for v in model.weights]
    return (
        layers,
        variables,
        model.compiled,
        id(getattr(model, "optimizer", None)),
        getattr(model, "note", None),
        sorted(vars(model)),
    )


def regressor() -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((4,)), L.Dense(8, activation="relu"), L.Dense(1)])


def named() -> Any:
    keras.utils.set_random_seed(1)
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    h = L.ReLU()(L.Add()([L.Dense(8)(a), L.Dense(8)(b)]))
    return keras.Model({"a": a, "b": b}, {"features": h, "logits": L.Dense(3)(h)})


def poison(model: Any, value: float) -> None:
    kernel = model.get_layer("head").kernel
    array = keras.ops.convert_to_numpy(kernel).copy()
    array[2, 1] = value
    kernel.assign(array)


def codes(path: Any) -> list[np.ndarray]:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    found = []
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if tensor.type == schema.TensorType.INT8 and data is not None and len(tensor.shape) > 1:
            found.append(np.frombuffer(bytes(data), np.int8).reshape(tensor.shape))
    return found


def cast(model: Any) -> Any:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float16")
    try:
        half = _net()
        half.set_weights(model.get_weights())
        return half
    finally:
        keras.config.set_dtype_policy(before)


def loader(x: np.ndarray, y: np.ndarray) -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(32)


BENCH = Bench(
    name="keras",
    target="litert",
    suffix=".tflite",
    layer="conv",
    build=build,
    regressor=regressor,
    named=named,
    arrange=lambda x: x[..., None],
    weights=lambda model: {f"{i}/{v.path}": keras.ops.convert_to_numpy(v) for i, v in enumerate(model.weights)},
    state=state,
    poison=poison,
    codes=codes,
    cast=cast,
    loader=loader,
)
