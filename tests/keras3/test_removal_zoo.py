"""The awkward cases of the zoo that only removal knows: tied, shared and frozen weights, fused heads, norms, extreme amounts."""

import keras
import numpy as np
import pytest

from whet.errors import ModelError, SpecError
from whet.keras import predict, remove
from whet.specs import Channel, Head, Prune
from zoo_keras import images, randomize

L, ops = keras.layers, keras.ops
HALF = Prune(0.5, granularity=Channel(), round_to=1)


def cut(inputs, outputs, x, spec=HALF):
    """The pruned model, the sizes of its smaller weights, and its step."""
    model = randomize(keras.Model(inputs, outputs))
    made, _, step = remove(model, spec, example=x)
    assert np.isfinite(predict(made, x)).all() and step.removal["oracle"] <= 1e-4
    return made, {row["name"]: row["left"] for row in step.changed}, step


def test_groups_of_a_group_norm_stay_whole() -> None:
    i = keras.Input((8, 8, 3))
    x = L.GroupNormalization(8, name="norm")(L.Conv2D(24, 3, name="a")(i))
    made, left, _ = cut(
        i, L.Dense(2)(L.GlobalAveragePooling2D()(x)), images(8, 8, 3), Prune(0.3, granularity=Channel(), round_to=1)
    )
    assert left["a/kernel"][-1] % 3 == 0 and made.get_layer("norm").groups == left["a/kernel"][-1] // 3 < 8


def test_halves_of_a_gate_lose_the_same_positions() -> None:
    i = keras.Input((10,))
    one, two = ops.split(L.Dense(12, name="wide")(i), 2, axis=-1)
    _, left, _ = cut(i, L.Dense(3, name="end")(one * ops.sigmoid(two)), images(10))
    assert left["wide/kernel"] == [10, 6] and left["end/kernel"] == [3, 3]


def fused(heads, size, grouped):
    i = keras.Input((5, 12))
    queries = 2 * heads if grouped else heads
    if grouped:
        x = L.GroupQueryAttention(size, queries, heads, name="attention")(i, i)
    else:
        qkv = L.EinsumDense("btd,dchk->btchk", (None, 3, heads, size), bias_axes="chk", name="qkv")(i)
        q, k, v = (ops.transpose(qkv[:, :, n], (0, 2, 1, 3)) for n in range(3))
        weights = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / size**0.5)
        x = ops.reshape(ops.transpose(ops.matmul(weights, v), (0, 2, 1, 3)), (-1, 5, heads * size))
    return i, L.Dense(3, name="end")(x)


def test_heads_of_a_fused_projection_and_of_grouped_queries() -> None:
    spec = Prune(0.5, granularity=Head())
    _, left, _ = cut(*fused(4, 2, grouped=False), images(5, 12), spec)
    assert left["qkv/kernel"] == [12, 3, 2, 2] and left["qkv/bias"] == [3, 2, 2] and left["end/kernel"] == [4, 3]
    made, left, _ = cut(*fused(2, 3, grouped=True), images(5, 12), spec)
    layer = made.get_layer("attention")
    assert layer.num_query_heads * 2 == 4 and layer.num_query_heads % layer.num_key_value_heads == 0
    assert left["attention/query/kernel"][1] == layer.num_query_heads


def test_a_tied_head_is_cut_once_and_stays_tied() -> None:
    i = keras.Input((7,), dtype="int32")
    words = (
        L.ReversibleEmbedding(20, 12, name="words") if hasattr(L, "ReversibleEmbedding") else L.Embedding(20, 12, name="words")
    )
    x = L.Dense(12, activation="gelu", name="b")(L.Dense(10, activation="gelu", name="a")(words(i)))
    end = words(x, reverse=True) if hasattr(L, "ReversibleEmbedding") else ops.matmul(x, ops.transpose(words.embeddings))
    model = randomize(keras.Model(i, end))
    tokens = np.arange(28).reshape(4, 7) % 20
    made, _, step = remove(model, HALF, example=tokens)
    assert step.removal["oracle"] <= 1e-4 and made.count_params() < model.count_params()
    assert sum("embeddings" in weight.path for weight in made.weights) == 1  # one table, read twice
    assert predict(made, tokens).shape == (4, 7, 20)


def test_a_siamese_tower_is_cut_once() -> None:
    one, two = keras.Input((8,), name="one"), keras.Input((8,), name="two")
    tower = keras.Sequential([keras.Input((8,)), L.Dense(12, activation="relu", name="a"), L.Dense(6, name="b")], name="tower")
    end = L.Dense(2, name="end")(ops.absolute(tower(one) - tower(two)))
    x = {"one": images(8), "two": images(8, seed=1)}
    made, left, _ = cut({"one": one, "two": two}, end, x)
    assert left["tower/a/kernel"] == [8, 6] and left["tower/b/kernel"] == [6, 3] and left["end/kernel"] == [3, 2]
    assert len(made.get_layer("tower").weights) == 4


def test_a_wrapped_weight_is_named_and_what_surrounds_it_leaves() -> None:
    i, why = keras.Input((8, 8, 3)), "SpectralNormalization in spectral cannot be followed"
    x = L.SpectralNormalization(L.Conv2D(8, 3), name="spectral")(i)
    with pytest.raises(ModelError, match=why):
        cut(i, L.Dense(2)(L.GlobalAveragePooling2D()(x)), images(8, 8, 3))
    after = L.GlobalAveragePooling2D()(L.Conv2D(6, 3, activation="relu", name="after")(x))
    made, left, step = cut(i, L.Dense(2, name="end")(after), images(8, 8, 3))
    assert left["after/kernel"] == [3, 3, 8, 3] and left["end/kernel"] == [3, 2]
    assert made.get_layer("spectral").layer.filters == 8 and why in str(step.skipped)


def test_norms_without_scale_or_offset_and_frozen_backbones() -> None:
    i = keras.Input((8, 8, 3))
    x = L.BatchNormalization(scale=False, center=False, name="bare")(L.Conv2D(8, 3, name="a")(i))
    frozen = L.BatchNormalization(name="frozen", trainable=False)
    x = L.GlobalAveragePooling2D()(frozen(L.Conv2D(8, 3, name="b", trainable=False)(L.ReLU()(x))))
    made, left, _ = cut(i, L.Dense(2, name="end")(x), images(8, 8, 3))
    assert left["bare/moving_mean"] == [4] and left["b/kernel"] == [3, 3, 4, 4] and left["frozen/gamma"] == [4]
    assert not made.get_layer("b").trainable and not made.get_layer("frozen").trainable


def one_wide(width):
    i = keras.Input((8, 8, 3))
    return i, L.Dense(2, name="end")(L.GlobalAveragePooling2D()(L.Conv2D(width, 3, name="a")(i)))


def test_extreme_amounts_leave_one_channel_or_are_refused() -> None:
    x = images(8, 8, 3)
    _, left, _ = cut(*one_wide(16), x, Prune(0.95, granularity=Channel(), round_to=1))
    assert left["a/kernel"] == [3, 3, 3, 1]
    _, left, _ = cut(*one_wide(16), x, Prune(0.95, granularity=Channel()))  # a multiple of 8
    assert left["a/kernel"] == [3, 3, 3, 8]
    with pytest.raises(ModelError, match="Prune would remove nothing"):
        cut(*one_wide(16), x, Prune(0.0, granularity=Channel()))
    with pytest.raises(SpecError, match="sparsity"):
        Prune(1.0, granularity=Channel())
    with pytest.raises(ModelError, match="Prune can remove nothing"):
        cut(*one_wide(1), x)


def test_the_head_is_protected_and_named() -> None:
    _, left, step = cut(*one_wide(8), images(8, 8, 3))
    assert left["end/kernel"] == [4, 2] and {"name": "end", "reason": "an output of the model"} in step.skipped
