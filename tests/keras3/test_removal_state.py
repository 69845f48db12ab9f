"""What a removal carries along: constants of channels that were no zeros, and the state of an optimizer."""

import keras
import numpy as np
import pytest

from whet.errors import ModelError
from whet.keras import predict, remove
from whet.specs import Channel, Prune
from zoo_keras import images, randomize

L = keras.layers
QUARTER = Prune(0.25, granularity=Channel(), round_to=1, include=("a",))
X = images(8, 8, 3)


def dead(build, *, bias=True):
    """A model whose convolution "a" has two of eight filters at zero, so that only their bias is left."""
    i = keras.Input((8, 8, 3))
    model = randomize(keras.Model(i, build(L.Conv2D(8, 3, name="a", use_bias=bias, activation="sigmoid")(i))))
    kernel = np.array(model.get_layer("a").kernel)
    kernel[..., [1, 4]] = 0
    model.get_layer("a").kernel.assign(kernel)
    return model


def exact(x):
    return L.Dense(3, name="end")(L.GlobalAveragePooling2D()(L.Conv2D(4, 3, name="b", activation="relu")(x)))


def behind_a_norm(x):
    x = L.BatchNormalization(name="norm")(L.Conv2D(4, 3, name="b", use_bias=False)(x))
    return L.Dense(3, name="end")(L.GlobalAveragePooling2D()(x))


def flat(x):
    return L.Dense(3, name="end")(L.Flatten()(x))


@pytest.mark.parametrize(("build", "bias", "into"), [(exact, True, "b/bias"), (behind_a_norm, False, "norm/moving_mean")])
def test_a_constant_is_folded_into_what_reads_it(build, bias, into) -> None:
    model = dead(build, bias=bias)
    made, _, step = remove(model, QUARTER, example=X)
    assert step.removal["constant"] == 2 and step.removal["varying"] == 0
    (row,) = step.removal["folded"]
    assert (row["layer"], row["channels"], row["into"], row["borders"]) == ("b", 2, into, "exact") and row["largest"] > 0.3
    np.testing.assert_allclose(predict(made, X), predict(model, X), rtol=1e-5, atol=1e-6)  # the original itself
    assert step.removal["change"] < 1e-5 and step.removal["oracle"] < 1e-5


def test_every_position_of_a_flattened_constant_is_folded() -> None:
    model = dead(flat)
    made, _, step = remove(model, QUARTER, example=X)
    assert step.removal["folded"][0]["channels"] == 2 * 36 and step.removal["folded"][0]["into"] == "end/bias"
    np.testing.assert_allclose(predict(made, X), predict(model, X), rtol=1e-5, atol=1e-6)


def test_where_padding_is_read_the_borders_are_said_to_differ() -> None:
    def padded(x):
        return L.Conv2D(4, 3, name="b", padding="same")(x)

    model = dead(padded)
    made, _, step = remove(model, QUARTER, example=X)
    assert step.removal["folded"][0]["borders"] == "differ"
    one, two = predict(made, X), predict(model, X)
    np.testing.assert_allclose(one[:, 1:-1, 1:-1], two[:, 1:-1, 1:-1], rtol=1e-5, atol=1e-6)
    assert np.abs(one - two).max() > 1e-3 and step.removal["change"] > 1e-3


def test_what_cannot_take_a_constant_is_reported() -> None:
    def bare(x):
        return L.Dense(3, name="end")(L.GlobalAveragePooling2D()(L.ReLU()(L.Conv2D(4, 1, name="b", use_bias=False)(x))))

    _, _, step = remove(dead(bare), QUARTER, example=X)
    assert not step.removal["folded"] and step.removal["change"] > 1e-4
    assert step.removal["left"][0]["reason"] == "it has no bias, and no batch norm reads it alone"


def test_channels_that_vary_are_dropped_as_before() -> None:
    i = keras.Input((8, 8, 3))
    model = randomize(keras.Model(i, exact(L.Conv2D(8, 3, name="a")(i))))
    before = np.array(model.get_layer("b").bias)
    made, _, step = remove(model, QUARTER, example=X)
    assert (step.removal["varying"], step.removal["constant"], step.removal["folded"]) == (2, 0, [])
    np.testing.assert_array_equal(np.array(made.get_layer("b").bias), before)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, use_ema=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}


def trained(name):
    """A model whose first two hidden units are the weakest, and its optimizer, after two steps."""
    keras.utils.set_random_seed(0)
    i = keras.Input((4,))
    model, optimizer = keras.Model(i, L.Dense(2, name="end")(L.Dense(6, name="a")(i))), OPTIMIZERS[name]()
    model.get_layer("a").kernel.assign(np.array(model.get_layer("a").kernel) * ([0.1] * 2 + [9.0] * 4))
    x, y = images(4, count=8), images(2, count=8)
    model.compile(optimizer=optimizer, loss="mse")
    for _ in range(2):
        model.train_on_batch(x, y)
    return model, optimizer, x, y


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_loses_the_same_positions(name) -> None:
    model, optimizer, x, y = trained(name)
    before = {variable.name: np.array(variable) for variable in optimizer.variables}
    made, _, _ = remove(model, Prune(1 / 3, granularity=Channel(), round_to=1), example=x, optimizer=optimizer)
    after = {variable.name: np.array(variable) for variable in optimizer.variables}
    assert list(after) == list(before) and int(optimizer.iterations) == 2
    left = {(4, 6): np.s_[:, 2:], (6,): np.s_[2:], (6, 2): np.s_[2:]}
    assert sum(value.shape == (4, 6) for value in before.values()) == (1 if name == "sgd" else 3 if name == "adam" else 2)
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value[left[value.shape]] if value.shape in left else value)
    assert any(np.abs(value).max() > 0 for key, value in after.items() if value.shape == (4, 4))
    made.compile(optimizer=optimizer, loss="mse")
    made.train_on_batch(x, y)
    assert int(optimizer.iterations) == 3 and np.isfinite(predict(made, x)).all()


def test_an_optimizer_of_another_model_is_refused_and_a_new_one_left_alone() -> None:
    model, _, x, _ = trained("sgd")
    other, optimizer, _, _ = trained("adam")
    spec = Prune(1 / 3, granularity=Channel(), round_to=1)
    with pytest.raises(ModelError, match="was built for variables that are not the model's"):
        remove(model, spec, example=x, optimizer=optimizer)
    fresh = keras.optimizers.Adam()
    remove(model, spec, example=x, optimizer=fresh)
    assert not fresh.built and other.get_layer("a").units == 6
