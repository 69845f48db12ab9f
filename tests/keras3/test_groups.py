"""Coupling groups read from Keras layer graphs: what leaves together, what stays and why, and what it costs."""

import keras
import numpy as np
import pytest

import whet
import zoo_keras
from whet.errors import ModelError
from whet.keras import groups, inspect
from zoo_keras import images

L = keras.layers


def members(family):
    return {(m.tensor, m.axis): m.positions.shape[1] for m in family.members}


def test_channels_of_a_residual_block_leave_with_all_that_holds_them() -> None:
    i = keras.Input((8, 8, 3))
    x = L.BatchNormalization(name="bn")(L.Conv2D(4, 3, padding="same", name="a")(i))
    x = L.Add()([x, L.Conv2D(4, 1, use_bias=False, name="b")(i)])
    found = groups(keras.Model(i, L.Dense(5, name="out")(L.Flatten()(x))), images(8, 8, 3))
    (family,) = found.families
    assert (family.name, family.kind, family.layer, len(family)) == ("a/kernel", "channel", "a", 4)
    held = {("a/kernel", 3): 1, ("a/bias", 0): 1, ("b/kernel", 3): 1, ("out/kernel", 0): 64}
    held |= {(f"bn/{name}", 0): 1 for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    assert members(family) == held
    flat = next(m for m in family.members if m.tensor == "out/kernel")
    np.testing.assert_array_equal(flat.positions[2], np.arange(64) * 4 + 2)  # channels run fastest
    assert family.parameters == 9 * 3 + 1 + 4 + 3 + 64 * 5
    assert family.macs == 64 * 27 + 64 * 3 + 64 * 5
    assert {(row.tensor, row.reason) for row in found.fixed} >= {("out/kernel", "an output of the model")}


@pytest.mark.parametrize("name", ["digits_cnn", "small_resnet", "depthwise", "grouped", "attention_layer", "one_dimensional"])
def test_costs_are_those_that_inspect_counts(name) -> None:
    model, inputs = zoo_keras.CASES[name]()
    size, summary = groups(model, inputs).size(), inspect(model, inputs)
    assert (size.macs, size.parameters, size.bytes) == (summary.macs, model.count_params(), 4 * model.count_params())


def test_depthwise_multiplier_grouped_and_separable() -> None:
    i = keras.Input((8, 8, 2))
    x = L.DepthwiseConv2D(3, depth_multiplier=3, name="dw")(L.Conv2D(4, 1, name="a")(i))
    x = L.Conv2D(8, 1, groups=4, name="g")(x)
    model = keras.Model(i, L.Dense(2)(L.GlobalMaxPooling2D()(L.SeparableConv2D(6, 3, name="s")(x))))
    found = {family.name: members(family) for family in groups(model, images(8, 8, 2)).families}
    # A group of g leaves with the input channel whose three products it reads.
    assert found["a/kernel"][("dw/kernel", 2)] == 1 and found["a/kernel"][("dw/bias", 0)] == 3
    assert found["a/kernel"][("g/kernel", 3)] == 2 and found["a/kernel"][("s/depthwise_kernel", 2)] == 2
    assert ("s/pointwise_kernel", 3) in found["s/pointwise_kernel"]


def test_heads_of_attention_and_of_grouped_queries() -> None:
    i = keras.Input((5, 6))
    x = L.MultiHeadAttention(4, 3, name="mha")(i, i)
    x = L.GroupQueryAttention(2, 6, 3, name="gqa")(x, x)
    found = {f.name: f for f in groups(keras.Model(i, x), images(5, 6)).families}
    one, two = found["mha/query/kernel[1]"], found["gqa/query/kernel[1]"]
    assert (one.kind, len(one), members(one)[("mha/attention_output/kernel", 0)]) == ("head", 4, 1)
    # Three queries share a key and a value, and leave with them.
    assert (two.kind, len(two), members(two)[("gqa/query/kernel", 1)], members(two)[("gqa/key/kernel", 1)]) == ("head", 3, 2, 1)


def test_what_a_recurrent_layer_an_embedding_and_a_norm_hold() -> None:
    i = keras.Input((7,), dtype="int32")
    x = L.Dense(6, name="wide")(L.Embedding(20, 8, name="words")(i))
    h = L.LSTM(5, name="lstm")(L.LSTM(4, return_sequences=True, name="first")(x))
    model = keras.Model(i, L.Dense(3, name="out")(L.LayerNormalization(name="norm")(h)))
    found = groups(model, np.zeros((2, 7), np.int32))
    held = {family.name: members(family) for family in found.families}
    units = {("first/lstm_cell/kernel", 1): 4, ("first/lstm_cell/recurrent_kernel", 0): 1}
    units |= {("first/lstm_cell/recurrent_kernel", 1): 4, ("first/lstm_cell/bias", 0): 4, ("lstm/lstm_cell/kernel", 0): 1}
    assert held == {
        "words/embeddings": {("words/embeddings", 1): 1, ("wide/kernel", 0): 1},
        "wide/kernel": {("wide/kernel", 1): 1, ("wide/bias", 0): 1, ("first/lstm_cell/kernel", 0): 1},
        "first/lstm_cell/kernel[1]": units,
    }
    gates = next(m for m in found.named("first/lstm_cell/kernel[1]").members if m.tensor == "first/lstm_cell/bias")
    np.testing.assert_array_equal(gates.positions[1], [1, 5, 9, 13])  # one column in each of four gates
    reasons = {row.tensor: row.reason for row in found.fixed}
    assert reasons["norm/gamma"] == "a layer norm takes statistics over it" and "lstm/lstm_cell/bias" in reasons


def test_what_is_not_followed_is_fixed_and_named() -> None:
    i = keras.Input((8, 8, 3))
    x = L.Lambda(lambda t: t * 2, name="twice")(L.Conv2D(4, 3, name="a")(i))
    x = L.Conv2D(4, 3, activation=lambda t: t + 1, name="b")(x)
    found = groups(keras.Model(i, L.Conv2D(2, 3, name="out")(x)), images(8, 8, 3))
    reasons = {row.tensor: row.reason for row in found.fixed}
    assert not found.families
    assert reasons["a/kernel"] == "Lambda in twice cannot be followed"
    assert reasons["b/kernel"] == "the activation <lambda> of b cannot be followed"
    assert "stays: a/kernel[3], 4 positions: Lambda" in str(found)


def test_sizes_that_the_graph_leaves_open_come_from_the_example() -> None:
    i = keras.Input((None, None, 3))
    model = keras.Model(i, L.Dense(2)(L.GlobalAveragePooling2D()(L.Conv2D(4, 3, padding="same")(i))))
    assert groups(model, images(6, 6, 3)).size().macs == 36 * 27 * 4 + 8
    assert groups(model, images(12, 6, 3)).size().macs == 72 * 27 * 4 + 8


def test_the_model_is_neither_called_nor_changed() -> None:
    model, inputs = zoo_keras.CASES["grouped"]()
    before = [np.array(w) for w in model.weights]
    found = whet.groups(model, inputs)
    assert len(found.families) > 1
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights, strict=True))
    with pytest.raises(ModelError, match="needs example="):
        groups(model, None)
