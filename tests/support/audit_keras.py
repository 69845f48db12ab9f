"""Keras models that the zoo of architectures does not hold: odd layers, numbers, outputs, policies. See test_audit.py."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

from audit import Row
from zoo_keras import images as normal
from zoo_keras import randomize

IMAGES, POINTS, SERIES = normal(8, 8, 3, count=16), normal(6, count=16), normal(5, 6, count=16)
TOKENS = np.random.default_rng(0).integers(0, 20, (16, 5)).astype(np.int32)


class Bare(L.Layer):
    """Weights of its own that scale and shift channels."""

    def build(self, shape):
        self.scale, self.shift = (self.add_weight(name=name, shape=(shape[-1],)) for name in ("scale", "shift"))

    def call(self, x):
        return ops.relu(x * self.scale + self.shift)


class Own(L.Layer):
    """A convolution by keras.ops, with a kernel of its own."""

    def build(self, shape):
        self.weight = self.add_weight(name="weight", shape=(3, 3, shape[-1], 6))

    def call(self, x):
        return ops.relu(ops.conv(x, self.weight))


class Either(L.Layer):
    """One of two layers, by what the values are."""

    def __init__(self, **options):
        super().__init__(**options)
        self.left, self.right = L.Dense(6), L.Dense(6)

    def call(self, x):
        return ops.cond(ops.mean(x) > 0, lambda: self.left(x), lambda: self.right(x))

    def compute_output_shape(self, shape):
        return shape


class Doubled(L.Dense):
    """A Dense that computes something else."""

    def call(self, x, training=None):
        return ops.relu(super().call(x)) * 2


class Plain(L.Dense):
    """A Dense under another name."""


class Reader(L.Layer):
    """Reads the embedding of another layer, and has no configuration that says so."""

    def __init__(self, embedding, **options):
        super().__init__(**options)
        self.embedding = embedding

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.embedding.embeddings))


def chain(*layers: Any, data: Any = IMAGES, change: Any = None, shape: Any = None) -> Any:
    """A Sequential of `layers`, made by functions; `change` gets the model."""

    def build():
        keras.utils.clear_session(free_memory=False)
        model = randomize(keras.Sequential([keras.Input(shape or data.shape[1:]), *(layer() for layer in layers)]))
        if change is not None:
            change(model)
        return model, data

    return build


def conv(filters=8, name="first", **options):
    return lambda: L.Conv2D(filters, 3, name=name, **options)


def dense(units=3, name="head", **options):
    return lambda: L.Dense(units, name=name, **options)


def convolutions(*between: Any, change: Any = None) -> Any:
    return chain(conv(), *between, conv(4, "second"), change=change)


def set_weights(name: str, change: Any) -> Any:
    def apply(model):
        kernel, *others = model.get_layer(name).get_weights()
        change(kernel, *others)
        model.get_layer(name).set_weights([kernel, *others])

    return apply


def with_policy(policy: str) -> Any:
    def build():
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            parts = [conv()(), L.BatchNormalization(), L.ReLU(), conv(4, "second")()]
            model = keras.Sequential([keras.Input((8, 8, 3)), *parts])
        finally:
            keras.config.set_dtype_policy(before)
        rng = np.random.default_rng(0)
        model.set_weights(
            [rng.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else rng.normal(0, 0.2, w.shape) for w in model.get_weights()]
        )
        return model, IMAGES

    return build


def outputs(shape: Any) -> Any:
    def build():
        entry = keras.Input((6,), name="x")
        h = L.Dense(8, activation="relu")(entry)
        return randomize(keras.Model(entry, shape(L.Dense(3)(h), h))), POINTS

    return build


def reversible():
    entry = keras.Input((5,), dtype="int32")
    embedding = L.ReversibleEmbedding(20, 8, name="embedding")
    x = L.Dense(8, activation="relu", name="middle")(embedding(entry))
    return randomize(keras.Model(entry, embedding(x, reverse=True))), TOKENS


def reader():
    entry = keras.Input((5,), dtype="int32")
    embedding = L.Embedding(20, 8)
    return randomize(keras.Model(entry, Reader(embedding)(embedding(entry)))), TOKENS


def grouped_query():
    entry = keras.Input((5, 8))
    x = L.GroupQueryAttention(4, 4, 2, name="attention")(entry, entry)
    return randomize(keras.Model(entry, L.Dense(3, name="head")(x))), normal(5, 8, count=16)


def siamese():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    branch = L.Dense(8, activation="relu", name="branch")
    return randomize(keras.Model([a, b], L.Dense(3)(branch(a) + branch(b)))), {"a": POINTS, "b": POINTS[::-1].copy()}


def two_readers():
    entry = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, use_bias=False)(entry)
    y = L.Conv2D(4, 1)(L.ReLU()(L.BatchNormalization(name="norm")(x)))
    return randomize(keras.Model(entry, y + L.Conv2D(4, 1)(x))), IMAGES


def one_norm():
    entry, norm = keras.Input((8, 8, 3)), L.BatchNormalization(name="norm")
    x = L.ReLU()(norm(L.Conv2D(8, 3)(entry)))
    return randomize(keras.Model(entry, norm(L.Conv2D(8, 3)(x)))), IMAGES


def lora(model):
    model.get_layer("first").enable_lora(2)


def frozen(model):
    model.trainable = False


def kernel(place: Any, value: Any) -> Any:
    def change(array, *_):
        array[place] = value

    return change


def off(_, bias):
    bias[:] = -100


class Foreign:
    """What a model of tf_keras looks like."""


Foreign.__module__ = "tf_keras.src.models"
norm = "batch_norm"
ROWS = [
    Row("9 grouped-query attention", grouped_query, 1, {"attention": "attention"}),
    Row(
        "11 recurrent",
        chain(lambda: L.LSTM(4, name="lstm"), dense(), data=SERIES),
        1,
        {"lstm": "lstm"},
        unwritten=r"dynamic=False.*unroll=True",
    ),
    Row("11 recurrent, unrolled", chain(lambda: L.GRU(4, unroll=True, name="gru"), dense(), data=SERIES), 1, {"gru": "gru"}),
    Row("12 an embedding both ways", reversible, 1, {"embedding": "embedding"}),
    Row("12 another layer's embedding", reader, refused="could not be copied.*get_config"),
    Row("13 siamese", siamese, 2),
    Row("14 own weights per channel", convolutions(lambda: Bare(name="bare")), 2, {"bare": "Bare"}),
    Row("15 a convolution of one's own", chain(lambda: Own(name="own"), L.Flatten, dense()), 1, {"own": "Own"}),
    Row(
        "16 spectral norm",
        chain(lambda: L.SpectralNormalization(L.Dense(8), name="norm"), dense(), data=POINTS),
        1,
        {"norm": "SpectralNormalization"},
    ),
    Row("16 a constraint", chain(dense(8, "first", kernel_constraint="max_norm"), L.ReLU, dense(), data=POINTS), 2),
    Row("17 batch norm without scale and offset", convolutions(lambda: L.BatchNormalization(center=False, scale=False)), 2),
    Row("17 frozen batch norm", convolutions(lambda: L.BatchNormalization(trainable=False), L.ReLU), 2),
    Row("17 layer norm", convolutions(lambda: L.LayerNormalization(name="norm")), 2, {"norm": "LayerNormalization"}),
    Row("17 batch norm first", chain(lambda: L.BatchNormalization(name="norm"), conv(), conv(4, "second")), 2, {"norm": norm}),
    Row("17 batch norm of rows", convolutions(lambda: L.BatchNormalization(axis=1, name="norm")), 2, {"norm": norm}),
    Row("17 a batch norm that does not read alone", two_readers, 3, {"norm": norm}),
    Row("17 one batch norm for two layers", one_norm, 2, {"norm": norm}),
    Row("18 sigmoid", convolutions(lambda: L.Activation("sigmoid")), 2),
    Row("18 GELU", chain(conv(activation="gelu"), conv(4, "second")), 2, {"first": "computes in float"}),
    Row("19 an output of probabilities", chain(L.Flatten, dense(activation="softmax"), data=IMAGES), 1),
    Row("20 everything frozen", convolutions(L.ReLU, change=frozen), 2),
    Row("21 one channel", chain(conv(1), L.ReLU, conv(1, "second")), 2),
    Row("22 one of two layers", chain(lambda: Either(name="either"), dense(), data=POINTS), 1, {"either": "Either"}),
    Row("23 list", outputs(lambda y, h: [y, h]), 2),
    Row("23 nested", outputs(lambda y, h: {"a": [y, h], "b": h}), 2),
    Row("23 one value twice", outputs(lambda y, h: [y, y]), 2),
    Row(
        "25 NaN in a weight",
        convolutions(change=set_weights("second", kernel((1, 2, 3, 1), np.nan))),
        refused=r"second/kernel' holds nan at index \(1, 2, 3, 1\)",
    ),
    Row("26 a channel of zeros", convolutions(L.ReLU, change=set_weights("first", kernel((..., 3), 0))), 2),
    Row("26 a weight of zeros", convolutions(L.ReLU, change=set_weights("second", kernel(..., 0))), 2),
    Row("26 a channel of denormals", convolutions(L.ReLU, change=set_weights("first", kernel((..., 3), 1e-39))), 2),
    Row("26 a layer that is always off", convolutions(L.ReLU, change=set_weights("first", off)), 2),
    Row("30 float16", with_policy("float16"), 2),
    Row("30 mixed bfloat16", with_policy("mixed_bfloat16"), 2),
    Row("30 float64", with_policy("float64"), 2),
    Row("33 a class of Dense", chain(lambda: Plain(8, activation="relu"), dense(), data=POINTS), 2),
    Row("33 a Dense that is none", chain(lambda: Doubled(8, name="mine"), dense(), data=POINTS), 1, {"mine": "Doubled"}),
    Row("33 LoRA", chain(dense(8, "first", activation="relu"), dense(), data=POINTS, change=lora), 1, {"first": "Dense"}),
    Row(
        "33 at every time step",
        chain(lambda: L.TimeDistributed(L.Dense(8), name="each"), L.Flatten, dense(), data=SERIES),
        1,
        {"each": "TimeDistributed"},
    ),
    Row("33 a causal convolution", chain(lambda: L.Conv1D(8, 3, padding="causal"), L.ReLU, dense(), data=SERIES), 2),
    Row("33 dense behind a convolution", chain(lambda: L.Conv1D(8, 3, activation="relu"), dense(), data=SERIES), 2),
    Row("34 a model of tf_keras", lambda: (Foreign(), POINTS), refused="package tf_keras.*package keras, version 3"),
]
