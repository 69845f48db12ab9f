"""A model as it is handed in: checked, copied, run, named."""

import gc
import random
import weakref

import keras
import numpy as np
import pytest

from keras_parts import Block, Sized, bare, cnn, dense, nested, same_weights
from whet.errors import DataError, ModelError
from whet.keras import copy, predict, validate
from whet.keras.views import kernels, unpruned, views, walk

L = keras.layers
X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


def _normalized():
    norm = L.Normalization()
    norm.adapt(np.random.default_rng(1).normal(3, 2, (64, 4)).astype("float32"))
    return keras.Sequential([L.Input((4,)), norm, L.Dense(2)])


def _deferred():
    model = keras.Sequential([L.Dense(3), keras.Sequential([L.Dense(2)])])
    model(X)
    return model


def _lambda():
    return keras.Sequential([L.Input((4,)), L.Lambda(lambda x: x * 2 + 1), L.Dense(2, activation=lambda x: x * 3)])


def _custom():
    i = keras.Input((4,))
    return keras.Model(i, Block(4)(i) + i)


MODELS = {f.__name__.lstrip("_"): f for f in (bare, dense, nested, _normalized, _deferred, _lambda, _custom)}


@pytest.mark.parametrize("name", MODELS)
def test_copy_computes_the_same_and_shares_nothing(name):
    model = MODELS[name]()
    before, weights = predict(model, X), model.get_weights()
    made = copy(model)
    after = predict(made, X)
    for old, new in zip(keras.tree.flatten(before), keras.tree.flatten(after), strict=True):
        assert np.array_equal(old, new)
    assert [path for path, _ in walk(made)] == [path for path, _ in walk(model)]
    assert [k.name for k in kernels(made)] == [k.name for k in kernels(model)]
    for weight in made.weights:
        weight.assign(weight + 1)
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


def test_copy_keeps_trainable_flags_random_state_and_sharing():
    model = nested()
    model.get_layer("shared").trainable = False
    random.seed(3)
    np.random.seed(3)
    state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    made = copy(model)
    assert random.getstate() == state and np.array_equal(np.random.get_state()[1], numpy_state)
    assert len(made.weights) == len(model.weights) and len(made.trainable_weights) == len(model.trainable_weights) == 6
    assert made.get_layer("shared") is made.get_layer("inner").layers[0]


def test_copy_refuses_a_class_whose_arguments_nobody_knows():
    model = Sized(7)
    model(X)
    with pytest.raises(ModelError, match=r"Sized takes units and has no get_config.*Give each custom class"):
        copy(model)


def test_names_are_unique_where_layer_names_repeat():
    names = list(views(nested()))
    assert names == ["shared/kernel", "inner/same/kernel", "deep/same/kernel", "same/kernel"]
    twice = keras.Model(i := keras.Input((4,)), _twin()(_twin()(i)))
    assert [k.name for k in kernels(twice)] == ["twin/a/kernel", "twin_b/a/kernel"]


def _twin(count=[0]):  # noqa: B006
    count[0] += 1
    return keras.Sequential([L.Input((4,)), L.Dense(4, name="a")], name="twin" if count[0] % 2 == 0 else "twin_b")


def test_channel_axes_of_every_kernel():
    i = keras.Input((8, 8, 4))
    x = L.Conv2D(6, 3, name="conv")(i)
    x = L.Conv2DTranspose(5, 3, name="up")(x)
    x = L.SeparableConv2D(7, 3, name="sep")(x)
    x = L.DepthwiseConv2D(3, depth_multiplier=2, name="dw")(x)
    x = L.Reshape((-1, 14))(x)
    x = L.MultiHeadAttention(2, 3, name="mha")(x, x)
    x = L.LSTM(3, name="lstm")(x)
    model = keras.Model(i, L.Dense(2, name="fc")(x))
    found = {k.name: (tuple(k.variable.shape), k.out_axis, k.in_axis) for k in kernels(model)}
    assert found == {
        "conv/kernel": ((3, 3, 4, 6), 3, 2),
        "up/kernel": ((3, 3, 5, 6), 2, 3),
        "sep/depthwise_kernel": ((3, 3, 5, 1), 2, None),
        "sep/pointwise_kernel": ((1, 1, 5, 7), 3, 2),
        "dw/kernel": ((3, 3, 7, 2), 2, None),
        "mha/query/kernel": ((14, 2, 3), 2, 0),
        "mha/key/kernel": ((14, 2, 3), 2, 0),
        "mha/value/kernel": ((14, 2, 3), 2, 0),
        "mha/attention_output/kernel": ((2, 3, 14), 2, 0),
        "fc/kernel": ((3, 2), 1, 0),
    }
    assert unpruned(model) == [("lstm/lstm_cell", "LSTMCell weights are not pruned")]


def test_predict_takes_tuples_and_dicts_and_keeps_the_output_structure():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model([a, b], [a - b, L.Dense(2)(a)])
    left, right = predict(model, (X, 2 * X))
    assert np.array_equal(left, -X) and right.shape == (5, 2)
    assert np.array_equal(predict(model, {"b": 2 * X, "a": X})[0], -X)
    assert set(predict(nested(), X)) == {"logits", "features"}
    assert predict(dense(), X[:2]).shape == (2, 3)


def test_predict_is_in_inference_mode_and_sees_new_weights():
    model = cnn(dropout=0.9, norm=True)
    x = np.ones((3, 8, 8, 1), "float32")
    first = predict(model, x)
    assert np.array_equal(first, predict(model, x))
    model.get_layer("out").bias.assign_add(np.ones(10, "float32"))
    np.testing.assert_allclose(predict(model, x), first + 1, rtol=1e-5)
    assert model.predict_function is None and not model.compiled


def test_predict_keeps_no_model_alive():
    model = dense()
    predict(model, X)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (dense, X[:, :3], r"has shape \(None, 4\), got an array of shape \(5, 3\)"),
        (dense, (X, X), "takes 1 inputs, got 2"),
        (nested, {"wrong": X}, "needs an input named .*; the batch has .'wrong'"),
        (bare, X[:, :3], r"cannot run on inputs of shape \(5, 3\): .*expected axis -1"),
    ],
)
def test_inputs_that_do_not_fit(make, inputs, message):
    with pytest.raises(DataError, match=message):
        predict(make(), inputs)


def test_validate_names_tensor_and_index():
    model = nested()
    validate(model)
    kernel = np.array(model.get_layer("inner").layers[1].kernel)
    kernel[2, 1] = np.inf
    model.get_layer("inner").layers[1].kernel.assign(kernel)
    with pytest.raises(ModelError, match=r"'inner/same/kernel' holds inf at index \(2, 1\), and 1 non-finite"):
        validate(model)


def test_validate_refuses_unbuilt_weightless_and_quantized_models():
    with pytest.raises(ModelError, match=r"not built.*Call it once"):
        validate(keras.Sequential([L.Dense(2)]))
    with pytest.raises(ModelError, match="has no weights"):
        validate(keras.Sequential([L.Input((4,)), L.ReLU()]))
    model = dense()
    model.get_layer("hidden").quantize("int8")
    with pytest.raises(ModelError, match="'hidden' is already quantized"):
        validate(model)


def test_mixed_precision_is_fine():
    model = keras.Sequential([L.Input((4,)), L.Dense(4, dtype="mixed_bfloat16"), L.Dense(2, dtype="mixed_float16")])
    validate(model)
    assert same_weights(copy(model), model)
    assert predict(model, X).dtype == np.float16
