"""Saving and loading without pickle: exact round trips, and what is refused."""

import json
import zipfile

import keras
import numpy as np
import pytest

from keras_parts import Bare, Block, bare, cnn, dense, nested, same_weights
from whet.errors import ModelError, RuntimeFileError
from whet.keras import load_model, predict, save_model
from whet.keras.views import views

L = keras.layers
X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


def custom():
    i = keras.Input((4,))
    return keras.Model(i, Block(4)(i) + i)


def with_lambda():
    return keras.Sequential([L.Input((4,)), L.Lambda(lambda x: x * 2), L.Dense(2)])


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True))


@pytest.mark.parametrize(
    "make",
    [
        dense,
        lambda: nested(shared_inside=False),
        custom,
        lambda: keras.Sequential([L.Input((4,)), L.Dense(2, dtype="mixed_bfloat16")]),
    ],
)
def test_round_trip_is_exact_without_the_code(make, tmp_path):
    model = make()
    kept = json.loads(json.dumps(save_model(model, tmp_path)))
    assert kept["file"] == "model.keras" and kept["needs_model"] is None
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
    loaded = load_model(tmp_path, kept, None)
    assert same_weights(loaded, model) and _same(predict(loaded, X), predict(model, X))
    assert list(views(loaded)) == list(views(model))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(bare, "class Bare of"), (with_lambda, "is a Lambda, whose Python code"), (nested, "Keras cannot rebuild it")],
)
def test_what_only_code_can_rebuild_needs_model(make, reason, tmp_path):
    model = make()
    kept = json.loads(json.dumps(save_model(model, tmp_path)))
    assert kept["file"] == "model.weights.h5" and reason in kept["needs_model"]
    with pytest.raises(ModelError, match=r"Only the weights were saved, because .* Pass model="):
        load_model(tmp_path, kept, None)
    loaded = load_model(tmp_path, kept, make)
    assert same_weights(loaded, model) and _same(predict(loaded, X), predict(model, X))
    assert list(views(loaded)) == list(views(model))


def test_an_instance_given_is_not_changed(tmp_path):
    model, other = dense(), dense()
    kept = save_model(model, tmp_path)
    before = other.get_weights()
    loaded = load_model(tmp_path, kept, other)
    assert same_weights(loaded, model) and all(np.array_equal(a, b) for a, b in zip(before, other.get_weights(), strict=True))
    assert load_model(tmp_path, kept, "keras_parts:dense").get_layer("hidden").units == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (cnn, "has 5 layers, saved were 2"),
        (lambda: dense(4), "does not take the weights"),
        (lambda: 3, "must build a keras.Model"),
        (Bare, "was never called"),
        (3, "must be a keras.Model or a function"),
        (lambda units: dense(units), "when called without arguments"),
    ],
)
def test_another_model_is_refused(given, message, tmp_path):
    kept = save_model(dense(), tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, kept, given)


def test_missing_and_damaged_files(tmp_path):
    kept = save_model(dense(), tmp_path)
    data = (tmp_path / "model.keras").read_bytes()
    (tmp_path / "model.keras").write_bytes(data[: len(data) // 2])
    for given in (None, dense):
        with pytest.raises(RuntimeFileError, match="Cannot read the"):
            load_model(tmp_path, kept, given)
    (tmp_path / "model.keras").unlink()
    with pytest.raises(RuntimeFileError, match="no such file"):
        load_model(tmp_path, kept, None)


def test_a_class_that_is_not_registered_in_this_process(tmp_path):
    @keras.saving.register_keras_serializable(package="whet_gone")
    class Gone(L.Layer):
        def call(self, x):
            return x

    model = keras.Sequential([L.Input((4,)), Gone(), L.Dense(2)])
    kept = save_model(model, tmp_path)
    assert kept["needs_model"] is None
    keras.saving.get_custom_objects().pop("whet_gone>Gone")
    with pytest.raises(ModelError, match=r"cannot be rebuilt .* or pass model="):
        load_model(tmp_path, kept, None)
