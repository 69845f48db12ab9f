"""The simulation computes what LiteRT's integer kernels compute, to the last bit."""

import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")
import keras
from keras import layers as L

import whet
from whet.keras.arithmetic import FixedPointSum, Requantize
from whet.keras.quantize import FakeQuantize
from whet.runtimes.sessions import open_session


def residual(channels=24, blocks=4):
    """Convolutions with residual sums, relu before and behind, and a product."""
    keras.utils.set_random_seed(3)
    keras.backend.clear_session()  # so that layers have the same names each time
    entry = keras.Input((16, 16, 3), name="image")
    x = L.Conv2D(channels, 3, padding="same", activation="relu")(entry)
    for _ in range(blocks):
        z = L.Conv2D(channels, 3, padding="same", activation="relu")(x)
        x = L.ReLU()(L.Add()([L.Conv2D(channels, 3, padding="same")(z), x]))
    gate = L.Conv2D(channels, 1)(x)
    x = L.DepthwiseConv2D(3, padding="same")(L.Multiply()([x, gate]))
    return keras.Model(entry, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The quantized model, its data, and what the exported file returns for them."""
    x = np.random.default_rng(0).normal(size=(96, 16, 16, 3)).astype(np.float32)
    quantized = whet.quantize(residual(), calibration=x[:32], target="litert", progress=False)
    path = quantized.export(tmp_path_factory.mktemp("file") / "model.tflite")
    session = open_session(path)
    assert session.runtime["kernels"].startswith("XNNPACK")
    return quantized, x, np.asarray(session.run(x))


def layers_of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def test_every_output_of_the_file_is_the_simulations(made):
    quantized, x, found = made
    assert len(layers_of(quantized.model, FixedPointSum)) == 4
    assert len(layers_of(quantized.model, Requantize)) == 13  # 10 convolutions, the depthwise one, the product, the dense layer
    expected = np.asarray(whet.keras.predict(quantized.model, x))
    assert np.mean(found == expected) >= 0.999


def test_without_the_rules_the_simulation_strays(made, monkeypatch):
    """So that the test above can fail."""
    quantized, x, found = made
    monkeypatch.setattr("whet.keras.arithmetic.arithmetic", lambda graph, plan: {})
    plain = whet.keras.simulate(residual(), quantized.plan)
    assert not layers_of(plain, (Requantize, FixedPointSum)) and layers_of(plain, FakeQuantize)
    assert np.mean(found == np.asarray(whet.keras.predict(plain, x))) < 0.97


def test_the_layers_change_rounding_errors_only_and_pass_gradients_on():
    tf = pytest.importorskip("tensorflow")
    x = tf.Variable(np.linspace(-2, 2, 60, dtype=np.float32).reshape(5, 4, 3))
    layer = Requantize([1e-4, 1e-3, 1e-2], [0.01, 0.1, 1.0], 0.01)
    with tf.GradientTape() as tape:
        y = layer(x)
        total = tf.reduce_sum(y * y)
    assert np.abs(y - x).max() <= 0.005 + 0.005  # half a code, and half a step of the coarsest channel
    np.testing.assert_allclose(np.asarray(tape.gradient(total, x)), 2 * np.asarray(y), rtol=1e-6)
    codes = np.asarray(y) / 0.01
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    again = Requantize.from_config(layer.get_config())
    np.testing.assert_array_equal(np.asarray(again(x)), np.asarray(y))
    summed = FixedPointSum(0.5, 0.25, [1 << 20, 1 << 19, 20], 0.5)
    left, right = np.asarray([1.0, -0.5], np.float32), np.asarray([0.25, 0.25], np.float32)
    np.testing.assert_array_equal(np.asarray(summed([left + right, left, right])), np.asarray([1.5, 0.0], np.float32))
    assert FixedPointSum.from_config(summed.get_config()).get_config() == summed.get_config()
