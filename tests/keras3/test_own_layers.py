"""Recurrent layers and layers of the user's own classes: what leaves from them, and what their code fixes."""

import keras
import numpy as np
import pytest

from whet.errors import ModelError
from whet.keras import predict, remove
from whet.keras.groups import groups
from whet.specs import Channel, Prune
from zoo_keras import images, randomize

L, ops = keras.layers, keras.ops
HALF = Prune(0.5, granularity=Channel(), round_to=1)
registered = keras.saving.register_keras_serializable("whet_tests_own_layers")


def halved(build, shape, tmp_path):
    """The pruned model of `build(input)`, loaded again by Keras alone, with what its step says."""
    i = keras.Input(shape)
    model, x = randomize(keras.Model(i, build(i))), images(*shape)
    made, _, step = remove(model, HALF, example=x)
    made.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(predict(again, x), predict(made, x))
    return made, {row["name"]: row["left"] for row in step.changed}, step


def stacked(i):
    return L.Dense(3)(L.GRU(8, name="gru")(L.LSTM(4, return_sequences=True, name="lstm")(i)))


def without_biases(i):
    return L.Dense(3)(L.GRU(8, reset_after=False, use_bias=False, name="gru")(L.Dense(6)(i)))


def both_ways(i):
    return L.Dense(3)(L.Bidirectional(L.LSTM(8), name="both")(i))


def both_ways_summed(i):
    return L.Dense(3)(L.Bidirectional(L.GRU(4, return_sequences=True), merge_mode="sum", name="both")(i))


def handed_on(i):
    _, h, c = L.LSTM(6, return_state=True, name="encoder")(i)
    return L.Dense(2)(L.LSTM(6, name="decoder")(i, initial_state=[h, c]))


def a_cell(i):
    return L.Dense(3)(L.RNN(L.SimpleRNNCell(8), name="rnn")(i))


RECURRENT = {
    stacked: {"lstm/lstm_cell/recurrent_kernel": [2, 8], "gru/gru_cell/kernel": [2, 12], "gru/gru_cell/bias": [2, 12]},
    without_biases: {"gru/gru_cell/kernel": [3, 12], "gru/gru_cell/recurrent_kernel": [4, 12]},
    both_ways: {"both/forward_lstm/lstm_cell/bias": [16], "both/backward_lstm/lstm_cell/kernel": [6, 16]},
    both_ways_summed: {"both/forward_gru/gru_cell/recurrent_kernel": [2, 6]},
    handed_on: {"encoder/lstm_cell/recurrent_kernel": [3, 12], "decoder/lstm_cell/recurrent_kernel": [3, 12]},
    a_cell: {"rnn/simple_rnn_cell/recurrent_kernel": [4, 4]},
}


@pytest.mark.parametrize("build", RECURRENT, ids=lambda build: build.__name__)
def test_hidden_units_leave_with_their_gates(build, tmp_path) -> None:
    keras.backend.clear_session()
    made, left, _ = halved(build, (7, 6), tmp_path)
    assert {name: left[name] for name in RECURRENT[build]} == RECURRENT[build]
    assert np.isfinite(predict(made, images(7, 6))).all()


def test_what_fixes_the_units_of_a_recurrent_layer_is_named() -> None:
    i = keras.Input((7, 6))
    x = L.LSTM(4, recurrent_activation="softmax", return_sequences=True, name="a")(i)
    x = L.RNN(L.StackedRNNCells([L.GRUCell(4), L.GRUCell(4)]), name="b")(x)
    with pytest.raises(ModelError, match=r"the activation softmax of a cannot be followed.*RNN in b cannot be followed"):
        remove(randomize(keras.Model(i, L.Dense(3)(x))), HALF, example=images(7, 6))


@registered
class Scaled(L.Layer):
    """No weights: a sum of two inputs."""

    def __init__(self, scale, **options):
        super().__init__(**options)
        self.scale = scale

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}

    def call(self, inputs):
        return inputs[0] + inputs[1] * self.scale


@registered
class Gain(L.Layer):
    """One weight, as long as its configuration or its input says."""

    def __init__(self, size=None, **options):
        super().__init__(**options)
        self.size = size

    def get_config(self):
        return {**super().get_config(), "size": self.size}

    def build(self, shape):
        self.gain = self.add_weight(shape=(self.size or shape[-1],), name="gain")

    def call(self, x):
        return x * self.gain


@registered
class Perceptron(L.Layer):
    """A layer of layers: `hidden` is fixed by its configuration."""

    def __init__(self, hidden, **options):
        super().__init__(**options)
        self.inside, self.out = L.Dense(hidden, activation="relu", name="inside"), L.Dense(4, name="out")

    def get_config(self):
        return {**super().get_config(), "hidden": self.inside.units}

    def build(self, shape):
        self.inside.build(shape)
        self.out.build((*shape[:-1], self.inside.units))

    def call(self, x, training=False):
        return self.out(self.inside(x))


@registered
class Times(L.Dense):
    """A Dense whose own call computes something else."""

    def call(self, x):
        return ops.tanh(ops.matmul(x, self.kernel))


def test_layers_of_the_users_are_read_by_what_their_code_does(tmp_path) -> None:
    def build(i):
        x = L.Conv2D(8, 3, padding="same", name="a")(i)
        x = Scaled(0.3)([x, L.Conv2D(8, 3, padding="same", name="b")(x)])
        x = L.Flatten()(Gain(name="gain")(x))
        return L.Dense(2, name="end")(Perceptron(6, name="mlp")(Times(5, use_bias=False, name="times")(x)))

    made, left, step = halved(build, (6, 6, 3), tmp_path)
    assert left["a/kernel"] == [3, 3, 3, 4] and left["b/kernel"] == [3, 3, 4, 4] and left["gain/gain"] == [4]
    assert left["times/kernel"] == [144, 5]  # 36 · 4 inputs of 36 · 8; what it makes, its configuration fixes
    assert left["mlp/inside/kernel"] == [5, 3] and left["mlp/out/kernel"] == [3, 4]  # whose hidden size its configuration tells
    reasons = {row["name"]: row["reason"] for row in step.skipped}
    assert reasons["times"] == "the model's own code fixes its size (times.kernel.shape)"
    assert type(made.get_layer("times")) is Times


def test_a_size_in_a_users_layer_that_its_configuration_does_not_tell_stays() -> None:
    def model(size):
        i = keras.Input((6, 6, 3))
        x = L.GlobalAveragePooling2D()(Gain(size, name="gain")(L.Conv2D(8, 3, name="a")(i)))
        return randomize(keras.Model(i, L.Dense(3, name="end")(x)))

    made, _, _ = remove(model(None), HALF, example=images(6, 6, 3))
    assert made.get_layer("a").filters == 4
    with pytest.raises(ModelError, match=r"a: the model's own code fixes its size \(gain.gain.shape\)"):
        remove(model(8), HALF, example=images(6, 6, 3))


def branching(x):
    return x * 2 if float(ops.max(x)) > 0 else x


class Opaque(L.Layer):
    """Code that asks for a value."""

    def call(self, x):
        return branching(x)

    def compute_output_shape(self, shape):
        return shape


def frames(i):
    """A convolution of every frame, and a dense layer at every step."""
    x = L.TimeDistributed(L.Conv2D(8, 3, activation="relu", name="conv2d"), name="conv")(i)
    x = L.TimeDistributed(L.DepthwiseConv2D(2, use_bias=False), name="depth")(x)
    x = L.TimeDistributed(L.MaxPooling2D(2))(x)
    x = L.TimeDistributed(L.Dense(6, activation="relu", name="dense"), name="each")(
        L.TimeDistributed(L.GlobalAveragePooling2D())(x)
    )
    return L.Dense(3, name="end")(L.GlobalAveragePooling1D()(x))


def test_layers_at_every_step_lose_channels(tmp_path) -> None:
    made, left, _ = halved(frames, (5, 7, 7, 2), tmp_path)
    assert left["conv/conv2d/kernel"] == [3, 3, 2, 4] and left["each/dense/kernel"] == [4, 3]
    assert made.get_layer("each").layer.units == 3 and made.get_layer("conv").layer.filters == 4
    i = keras.Input((5, 7, 7, 2))
    found = groups(keras.Model(i, frames(i)), images(5, 7, 7, 2))
    assert found.macs_of(lambda layer: layer.startswith("conv")) == 5 * 25 * 9 * 2 * 8
    assert found.macs_of(lambda layer: layer.startswith("each")) == 5 * 8 * 6


def test_what_cannot_be_traced_is_named() -> None:
    i = keras.Input((6, 6, 3))
    x = L.TimeDistributed(L.EinsumDense("ab,bc->ac", 4), name="each")(L.Reshape((16, 8))(L.Conv2D(8, 3, name="a")(i)))
    model = randomize(keras.Model(i, L.Dense(2)(L.GlobalAveragePooling1D()(x))))
    with pytest.raises(ModelError, match="TimeDistributed in each cannot be followed"):
        remove(model, HALF, example=images(6, 6, 3))
    x = Opaque(name="odd")(L.Conv2D(8, 3, name="a")(i))
    with pytest.raises(ModelError, match="Opaque in odd cannot be followed: The code of 'odd'"):
        remove(keras.Model(i, L.Dense(2)(L.GlobalAveragePooling2D()(x))), HALF, example=images(6, 6, 3))
