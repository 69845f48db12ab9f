"""Layers, shapes, parameters, multiply-accumulates and bytes, by hand."""

import keras
import numpy as np
import pytest

from keras_parts import bare, nested
from whet.errors import DataError, ModelError
from whet.keras import inspect

L = keras.layers
X = np.zeros((3, 4), "float32")


def rows(summary):
    return {row.name: (row.kind, row.output_shape, row.parameters, row.macs, row.bytes) for row in summary.rows}


def test_every_kind_of_kernel_by_hand():
    i = keras.Input((8, 8, 4))
    x = L.Conv2D(6, 3, strides=2, padding="same", groups=2, name="conv")(i)
    x = L.BatchNormalization(name="norm")(x)
    x = L.Conv2DTranspose(5, 2, strides=2, name="up")(x)
    x = L.SeparableConv2D(7, 3, name="sep")(x)
    x = L.DepthwiseConv2D(3, depth_multiplier=2, name="dw")(x)
    x = L.Reshape((16, 14), name="reshape")(x)
    x = L.EinsumDense("...x,xy->...y", output_shape=(6,), name="einsum")(x)
    x = L.MultiHeadAttention(2, 3, name="mha")(x, x)
    x = L.GRU(5, name="gru")(x)
    model = keras.Model(i, L.Dense(2, name="fc")(x))
    summary = inspect(model, np.zeros((3, 8, 8, 4), "float32"))
    assert rows(summary) == {
        "conv": ("Conv2D", (None, 4, 4, 6), 114, 16 * 108, 456),
        "norm": ("BatchNormalization", (None, 4, 4, 6), 24, 0, 96),
        "up": ("Conv2DTranspose", (None, 8, 8, 5), 125, 16 * 120, 500),
        "sep": ("SeparableConv2D", (None, 6, 6, 7), 45 + 35 + 7, 36 * 80, 348),
        "dw": ("DepthwiseConv2D", (None, 4, 4, 14), 126 + 14, 16 * 126, 560),
        "reshape": ("Reshape", (None, 16, 14), 0, 0, 0),
        "einsum": ("EinsumDense", (None, 16, 6), 84, 16 * 84, 336),
        "mha/query": ("EinsumDense", (None, 16, 2, 3), 42, 16 * 36, 168),
        "mha/key": ("EinsumDense", (None, 16, 2, 3), 42, 16 * 36, 168),
        "mha/value": ("EinsumDense", (None, 16, 2, 3), 42, 16 * 36, 168),
        "mha/attention_output": ("EinsumDense", (None, 16, 6), 42, 16 * 36, 168),
        "mha": ("MultiHeadAttention", (None, 16, 6), 0, 2 * 16 * 16 * 6, 0),
        "gru": ("GRU", (None, 5), 6 * 15 + 5 * 15 + 30, 16 * (90 + 75), 780),
        "fc": ("Dense", (None, 2), 12, 10, 48),
    }
    assert summary.parameters == model.count_params() and summary.never_run == ()
    assert "conv" in str(summary)


def test_shared_layers_count_once_and_run_twice():
    model = nested()
    found = rows(inspect(model, X))
    assert found["shared"] == ("Dense", (None, 4), 20, 3 * 16, 80)  # outside once, inside `inner` twice
    assert found["inner/same"][3] == 2 * 16
    assert sum(row[2] for row in found.values()) == model.count_params()


def test_what_never_ran_is_named_and_counted():
    class Part(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = L.Dense(3, name="used"), L.Dense(2, name="unused")
            self.unused.build((None, 4))

        def call(self, x):
            return self.used(x)

    model = Part()
    model(X)
    call = keras.Layer.__call__
    summary = inspect(model, X)
    assert summary.never_run == ("unused",) and rows(summary)["unused"][2:4] == (10, 0)
    assert keras.Layer.__call__ is call


def test_sixteen_bits_and_weights_of_the_model_itself():
    model = keras.Sequential([L.Input((4,)), L.Dense(2, dtype="float16")])
    assert inspect(model, X).bytes == 2 * 10

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.scale = self.add_weight(shape=(4, 3), name="scale")

        def call(self, x):
            return keras.ops.matmul(x, self.scale)

    model = Own()
    model(X)
    assert inspect(model, X).parameters == 12


def test_refusals():
    with pytest.raises(DataError, match="cannot run on inputs"):
        inspect(bare(), X[:, :2])
    with pytest.raises(ModelError, match="needs example="):
        inspect(bare(), None)
    with pytest.raises(ModelError, match=r"needs a keras\.Model"):
        inspect(3, X)
