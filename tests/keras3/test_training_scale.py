"""Accumulated and clipped gradients in Whet's own loop."""

import keras
import numpy as np
import pytest

import whet
from whet import Train
from whet.errors import SpecError

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(32, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def batches(size):
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, 32, size)]


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])


def weights(size, **fields):
    spec = Train(epochs=2, learning_rate=0.01, **fields)
    return np.concatenate(
        [w.ravel() for w in whet.fit(network(), spec, train=batches(size), progress=False).model.get_weights()]
    )


def test_accumulated_batches_are_one_of_their_size():
    np.testing.assert_allclose(weights(8, accumulate=2, decay=None), weights(16, decay=None), atol=1e-6)
    assert np.abs(weights(8, decay=None) - weights(16, decay=None)).max() > 1e-3


def test_clipped_gradients_are_those_of_keras_global_clipnorm():
    model = network()
    model.compile(
        keras.optimizers.Adam(0.01, global_clipnorm=1e-8), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    for _ in range(2):
        for x, y in batches(16):
            model.train_on_batch(x, y)
    expected = np.concatenate([w.ravel() for w in model.get_weights()])
    # Adam does not see the scale of gradients, but for its epsilon: so tiny a norm shows whether clipping took place.
    np.testing.assert_allclose(weights(16, clip=1e-8, decay=None), expected, atol=1e-6)
    assert np.abs(weights(16, decay=None) - expected).max() > 1e-3


def test_precision_is_the_models_own():
    with pytest.raises(SpecError, match="set_dtype_policy"):
        whet.fit(network(), Train(epochs=1, precision="bfloat16"), train=batches(16), progress=False)


def test_a_step_compiled_by_xla_trains_alike(monkeypatch):
    asked = []
    own = keras.Model.compile
    monkeypatch.setattr(
        keras.Model, "compile", lambda self, **options: asked.append(options["jit_compile"]) or own(self, **options)
    )
    np.testing.assert_allclose(weights(16, compile=True), weights(16), atol=1e-6)
    assert asked == [True, False]


@pytest.mark.parametrize("fields", [{"compile": "inductor"}, {"shard": True}])
def test_what_is_for_pytorch_models_is_said(fields):
    with pytest.raises(SpecError, match=r"is for PyTorch models\. Keras models take compile=True \(XLA\)"):
        whet.fit(network(), Train(epochs=1, **fields), train=batches(16), progress=False)
