"""Losses on features and relations with Keras: the piece, its gradients, relations inside `Train`, and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_parts import dense, fitted, points
from whet import keras as side
from whet.data import Batches
from whet.errors import ModelError
from whet.numerics.losses_features import attention_transfer, hints
from whet.numerics.losses_layers import layer_loss
from whet.numerics.namespace import numpy_namespace
from whet.specs import PKT, RKD, AttentionTransfer, Distill, Features, SimilarityPreserving, Train

# Losses on layers are tested alone; that they should not be used so is tested too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Nothing but .* teaches:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* without a loss on the outputs:UserWarning"),
]

SPECS = [Features("a", "b"), AttentionTransfer("a", "b"), RKD(), SimilarityPreserving(), PKT()]


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_values_and_gradients_are_those_of_the_formula(spec):
    s, t = (np.random.default_rng(seed).normal(size=(4, *shape)) for seed, shape in enumerate([(4, 2, 3), (2, 2, 3)]))
    student, teacher = tf.Variable(s), tf.Variable(t)
    with tf.GradientTape() as tape:
        loss = side.layer_loss(spec, student, teacher)
    found, none = tape.gradient(loss, [student, teacher])
    value = lambda z: layer_loss(spec, z, t, xp=numpy_namespace)  # noqa: E731
    assert float(loss) == pytest.approx(value(s), rel=1e-10) and none is None
    for index in [(0, 0, 0, 0), (1, 3, 1, 2), (3, 2, 0, 1)]:
        step = np.zeros_like(s)
        step[index] = 1e-6
        assert found.numpy()[index] == pytest.approx((value(s + step) - value(s - step)) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_gradients_are_finite_where_all_examples_are_equal(spec, value):
    student, teacher = tf.Variable(np.full((3, 2, 2, 4), value, "float32")), np.ones((3, 2, 2, 4), "float32")
    with tf.GradientTape() as tape:
        loss = side.layer_loss(spec, student, teacher)
    assert np.isfinite(float(loss)) and np.isfinite(tape.gradient(loss, student).numpy()).all()


def test_relations_between_outputs_in_training():
    teacher, student = dense(), dense()
    x, y = points(32)
    s, t = side.predict(student, x), side.predict(teacher, x)
    losses = [RKD(weight=0.5), PKT(), SimilarityPreserving(weight=2.0)]
    wanted = sum(spec.weight * layer_loss(spec, s, t, xp=numpy_namespace) for spec in losses)
    spec = Train(epochs=1, apply=[Distill(losses, student_weight=0)])
    _, step = fitted(student, spec, teacher=teacher, train=Batches((x, y), "train", batch=32), val=None)
    assert step.train["history"][0]["loss"] == pytest.approx(wanted, rel=1e-4)


def convolutions(width):
    """Two convolutions, at 6×6 and 3×3, and a head."""
    i = keras.Input((6, 6, 1), name="x")
    h = keras.layers.Conv2D(width, 3, padding="same", activation="relu", name="conv1")(i)
    h = keras.layers.BatchNormalization(name="bn")(h)
    h = keras.layers.Conv2D(width, 3, padding="same", strides=2, activation="relu", name="conv2")(h)
    return keras.Model({"x": i}, {"logits": keras.layers.Dense(3, name="head")(keras.layers.Flatten()(h))})


def test_features_are_further_outputs_of_the_same_weights():
    model = convolutions(4)
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 1)).astype("float32")
    names = [layer.name for layer in model.layers]
    heard = side.with_features(model, "conv*", "head")
    outputs, found = heard({"x": x}, training=False)
    assert list(found) == ["conv1", "conv2", "head"] and found["conv2"].shape == (5, 3, 3, 4)
    np.testing.assert_array_equal(outputs["logits"], side.predict(model, {"x": x})["logits"])
    np.testing.assert_array_equal(outputs["logits"], found["head"])
    assert all(a is b for a, b in zip(heard.weights, model.weights, strict=True))
    assert [layer.name for layer in model.layers] == names
    plain, found = side.with_features(dense(), "hidden")(points(8)[0])  # a Sequential
    assert plain.shape == (8, 3) and found["hidden"].shape[0] == 8


def test_features_are_learned_in_a_loop_of_ones_own():
    student, teacher = side.with_features(convolutions(4), "conv*"), side.with_features(convolutions(4), "conv*")
    x = {"x": np.random.default_rng(0).normal(size=(32, 6, 6, 1)).astype("float32")}
    taught, optimizer, seen = teacher(x, training=False)[1], keras.optimizers.Adam(0.01), []
    specs = [AttentionTransfer("conv1", "conv1"), Features("conv2", "conv2")]
    for _ in range(25):
        with tf.GradientTape() as tape:
            found = student(x, training=True)[1]
            loss = sum(side.layer_loss(spec, found[spec.student], taught[spec.teacher]) for spec in specs)
        layers = [v for name in ("conv1", "bn", "conv2") for v in student.get_layer(name).trainable_variables]
        optimizer.apply_gradients(zip(tape.gradient(loss, layers), layers, strict=True))
        seen.append(float(loss))
        if len(seen) == 1:
            a, b = ([np.asarray(part[name]) for name in ("conv1", "conv2")] for part in (found, taught))
            wanted = attention_transfer(a[0], b[0], xp=numpy_namespace) + hints(a[1], b[1], xp=numpy_namespace)
            assert seen[0] == pytest.approx(wanted, rel=1e-5)
    assert seen[-1] < 0.5 * seen[0]


def test_features_that_cannot_be_had_are_named():
    model = convolutions(4)
    with pytest.raises(ModelError, match=r"'conv9' matches no layer .* Its layers: conv1, bn, conv2"):
        side.with_features(model, "conv9")
    with pytest.raises(ModelError, match="at least one layer"):
        side.with_features(model)
    i = keras.Input((4,))
    layer = keras.layers.Dense(4, name="elsewhere")
    layer(keras.Input((4,)))
    with pytest.raises(ModelError, match="Of elsewhere not every output is made from the inputs"):
        side.with_features(keras.Model(i, layer(i)), "elsewhere")

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ModelError, match="Own has no layer graph"):
        side.with_features(Own(), "a")
