"""Real removal from Keras models: exact against the original with the same channels silenced."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo_keras
from whet.data import Batches, leaves
from whet.errors import ModelError, SpecError
from whet.keras import copy, dimensions, predict, remove
from whet.specs import (
    BatchNormScale,
    Channel,
    Fisher,
    GeometricMedian,
    Head,
    Prune,
    Random,
    Taylor,
    UserCriterion,
)
from zoo_keras import images, randomize

L = keras.layers
HALF = Prune(0.5, granularity=Channel(), round_to=1)
NOTHING_LEAVES = {"fused_qkv", "shared_layer", "several_outputs"}


def cut(model, inputs, spec=HALF, **options):
    made, _, step = remove(model, spec, example=inputs, **options)
    return made, step


@pytest.mark.parametrize("name", sorted(set(zoo_keras.CASES) - NOTHING_LEAVES))
def test_the_zoo_loses_channels(name) -> None:
    model, inputs = zoo_keras.CASES[name]()
    before = [np.array(w) for w in model.weights]
    made, step = cut(model, inputs)  # which compares with the silenced original
    assert made.count_params() < model.count_params() and type(made) is type(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights, strict=True))
    weights = {row["name"]: row["left"] for row in step.changed}
    assert weights and sum(np.prod(r["shape"]) - np.prod(r["left"]) for r in step.changed) == (
        model.count_params() - made.count_params()
    )
    again = copy(made)
    for one, two in zip(leaves(predict(made, inputs)), leaves(predict(again, inputs)), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", sorted(NOTHING_LEAVES))
def test_what_has_only_inputs_and_outputs_is_refused_by_name(name) -> None:
    model, inputs = zoo_keras.CASES[name]()
    with pytest.raises(ModelError, match=r"Prune can remove nothing from this model .*an (input|output) of the model"):
        cut(model, inputs)


@pytest.mark.parametrize(("name", "left"), [("fused_qkv", None), ("attention_layer", "_num_heads")])
def test_heads_leave(name, left) -> None:
    model, inputs = zoo_keras.CASES[name]()
    made, _ = cut(model, inputs, Prune(0.5, granularity=Head()))
    assert made.count_params() < model.count_params()
    if left:
        old, new = (next(layer for layer in m.layers if hasattr(layer, left)) for m in (model, made))
        assert getattr(new, left) == getattr(old, left) // 2


def test_the_textbook_by_hand() -> None:
    i = keras.Input((4, 4, 2))
    x = L.ReLU()(L.BatchNormalization(name="bn")(L.Conv2D(4, 3, name="a")(i)))
    model = randomize(keras.Model(i, L.Dense(3, name="out")(L.GlobalAveragePooling2D()(x))))
    a = model.get_layer("a")
    kernel = np.array(a.kernel)
    kernel *= np.asarray([1.0, 0.01, 2.0, 0.02]) / np.sqrt((kernel**2).sum((0, 1, 2)))
    a.kernel.assign(kernel)
    a.bias.assign(np.zeros(4))
    model.get_layer("out").kernel.assign(np.ones((4, 3)))
    for name in ("gamma", "moving_variance"):
        getattr(model.get_layer("bn"), name).assign(np.ones(4))
    for name in ("beta", "moving_mean"):
        getattr(model.get_layer("bn"), name).assign([0.1, 0.1, 0.1, 0.1])
    made, step = cut(model, images(4, 4, 2))
    np.testing.assert_array_equal(np.array(made.get_layer("a").kernel), kernel[..., [0, 2]])
    x = images(4, 4, 2).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2)).transpose(0, 1, 2, 4, 5, 3)
    y = (np.einsum("nijhwc,hwco->nijo", windows, kernel[..., [0, 2]].astype(np.float64)) - 0.1) / np.sqrt(1 + 1e-3) + 0.1
    expected = np.maximum(y, 0).mean((1, 2)).sum(-1, keepdims=True) + np.array(model.get_layer("out").bias)
    np.testing.assert_allclose(predict(made, images(4, 4, 2)), expected, rtol=1e-5, atol=1e-5)
    assert step.changed[0] == {
        "name": "a/kernel",
        "parameters": 72,
        "removed": 0.5,
        "shape": [3, 3, 2, 4],
        "left": [3, 3, 2, 2],
    }


def test_attributes_and_the_file_say_the_new_sizes(tmp_path) -> None:
    i = keras.Input((8, 8, 3))
    x = L.GroupNormalization(4, name="gn")(L.Conv2D(16, 3, name="a")(i))
    x = L.Conv2D(16, 3, groups=4, name="g", activation="relu")(x)
    x = L.Dense(12, name="d")(L.Flatten()(x))
    x = L.Reshape((3, 4), name="r")(x)
    x = keras.ops.pad(keras.ops.reshape(x, (-1, 12)), ((0, 0), (0, 2)))
    model = randomize(keras.Model(i, L.Dense(5, name="out")(x)))
    made, _ = cut(model, images(8, 8, 3))
    sizes = {layer.name: layer for layer in made.layers}
    assert (sizes["gn"].groups, sizes["a"].filters, sizes["g"].groups, sizes["d"].units) == (2, 8, 2, 6)
    assert sizes["r"].target_shape in ((3, 2), (1, 4)) and made.get_layer("g").output.shape == (None, 4, 4, sizes["g"].filters)
    made.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")  # Keras alone, without Whet
    np.testing.assert_array_equal(again(images(8, 8, 3)), made(images(8, 8, 3)))


class Reshaping(keras.Model):
    """A subclassed model: one size is free in its code, another is written into it."""

    def __init__(self, size=-1, **options):
        super().__init__(**options)
        self.size = size
        self.first, self.norm = L.Conv2D(8, 3, activation="relu"), L.BatchNormalization()
        self.second, self.out = L.Conv2D(6, 3), L.Dense(3)

    def call(self, x):
        x = keras.ops.relu(self.second(self.norm(self.first(x))))
        return self.out(keras.ops.reshape(x, (-1, self.size) if self.size > 0 else (keras.ops.shape(x)[0], self.size)))

    def get_config(self):
        return {"size": self.size}


def subclassed(size=-1):
    model = Reshaping(size)
    model(images(8, 8, 3))
    return randomize(model)


def test_a_subclassed_model_keeps_its_class_and_what_its_code_fixes() -> None:
    made, step = cut(subclassed(), images(8, 8, 3))
    assert type(made) is Reshaping and (made.first.filters, made.second.filters) == (4, 3)
    np.testing.assert_array_equal(predict(copy(made), images(8, 8, 3)), predict(made, images(8, 8, 3)))
    made, step = cut(subclassed(96), images(8, 8, 3))
    assert (made.first.filters, made.second.filters) == (4, 6)
    assert any("the model's own code fixes its size (reshape/Reshape:0)" in row["reason"] for row in step.skipped)


def test_an_operation_followed_wrongly_never_passes(monkeypatch) -> None:
    model, inputs = zoo_keras.CASES["digits_cnn"]()
    monkeypatch.setitem(dimensions.RULES, L.Flatten, lambda call: _wrong_flatten(call))
    with pytest.raises(ModelError, match="an operation is followed wrongly"):
        cut(model, inputs)


def _wrong_flatten(call):
    """Channels first, of the same sizes."""
    from whet.graph import moves

    call.reader.writable.add(call.name)
    x = call.x
    return moves.reshape(call.s, (x[0], x[3], x[1], x[2]), call.shape, call.name, range(2))


def test_rounding_keep_include_and_patterns() -> None:
    model, inputs = zoo_keras.CASES["digits_cnn"]()
    wide = {layer.name: layer.filters for layer in model.layers if hasattr(layer, "filters")}
    made, _ = cut(model, inputs, Prune(0.4, granularity=Channel(), round_to=4))
    assert all(layer.filters % 4 == 0 for layer in made.layers if hasattr(layer, "filters"))
    first = next(iter(wide))
    made, step = cut(model, inputs, Prune(0.5, granularity=Channel(), round_to=1, keep=(first, "nothing")))
    assert made.get_layer(first).filters == wide[first] and step.unmatched == ("nothing",)
    made, _ = cut(model, inputs, Prune(0.5, granularity=Channel(), round_to=1, include=(first,)))
    assert made.get_layer(first).filters == wide[first] // 2
    assert all(made.get_layer(name).filters == n for name, n in wide.items() if name != first)


def lowest_first(weight, gradient):
    """The channels that a kernel produces, from the last to the first; nothing for what it reads."""
    return -np.arange(4.0) + 4 + 0 * weight if weight.shape[-1] == 4 else 0 * weight


def test_criteria_choose_their_channels() -> None:
    i = keras.Input((6, 6, 3))
    x = L.ReLU()(L.BatchNormalization(name="bn")(L.Conv2D(4, 3, name="a", use_bias=False)(i)))
    model = randomize(keras.Model(i, L.Dense(3, name="out")(L.GlobalAveragePooling2D()(x))))
    model.get_layer("bn").gamma.assign([0.9, 0.1, -0.2, 0.8])
    kernel = np.array(model.get_layer("a").kernel)
    kernel[..., 3] = kernel[..., 0] + 1e-4
    model.get_layer("a").kernel.assign(kernel)
    out = np.array(model.get_layer("out").kernel)
    data = Batches([(images(6, 6, 3), np.asarray([0, 1, 2, 0, 1]))], "train")

    def kept(criterion, **options):
        made, _ = cut(model, images(6, 6, 3), Prune(0.5, granularity=Channel(), round_to=1, criterion=criterion), **options)
        small = np.array(made.get_layer("out").kernel)
        return [int(np.flatnonzero((out == row).all(1))[0]) for row in small]

    assert kept(BatchNormScale()) == [0, 3]
    assert set(kept(GeometricMedian())) != {0, 3}  # one replaces the other
    assert kept(UserCriterion(lowest_first)) == [0, 1]
    assert kept(Taylor(), data=data) == kept(Taylor(), data=data) and len(kept(Fisher(), data=data)) == 2
    assert kept(Random(seed=1)) == kept(Random(seed=1))
    with pytest.raises(SpecError, match="Taylor needs data"):
        kept(Taylor())


def test_taylor_is_the_gradient_times_the_weight() -> None:
    from whet.keras.importance import gradients_for

    i = keras.Input((3,))
    model = randomize(keras.Model(i, L.Dense(1, name="out")(L.Dense(2, name="a")(i))))
    x, y = images(3, count=4), np.ones((4, 1), np.float32)
    model.trainable = False  # frozen weights have gradients too
    slopes = gradients_for(model, Batches([(x, y)], "train"), 8)
    gap = predict(model, x).astype(np.float64) - y
    expected = x.T @ (2 * gap / 4) @ np.array(model.get_layer("out").kernel).T
    np.testing.assert_allclose(slopes["a/kernel"], expected, rtol=1e-4, atol=1e-6)


def test_half_precision_and_masks_go_along() -> None:
    i = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, name="a", dtype="mixed_float16")(i)
    model = randomize(keras.Model(i, L.Dense(3, name="out", dtype="mixed_float16")(L.GlobalMaxPooling2D()(x))))
    mask = np.ones((3, 3, 3, 8), np.uint8)
    mask[0, 0] = 0
    made, masks, _ = remove(model, HALF, example=images(8, 8, 3), masks={"a/kernel": mask})
    assert made.get_layer("a").compute_dtype == "float16" and made.get_layer("a").variable_dtype == "float32"
    assert masks["a/kernel"].shape == (3, 3, 3, 4) and not masks["a/kernel"][0, 0].any()


KINDS = "conv add concat depthwise grouped transposed norm shuffle gate halves groups attention rows steps".split()


def chain(kinds, numbers, is_flat):
    """A chain of layers with shortcuts, concatenations, depthwise, grouped and transposed convolutions."""
    i = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, padding="same", activation="relu")(i)
    for kind, n in zip(kinds, numbers, strict=False):
        width = x.shape[-1]
        if kind == "add":
            x = L.Add()([x, L.Conv2D(width, 3, padding="same")(x)])
        elif kind == "concat":
            x = L.Concatenate()([x, L.Conv2D(2 * n, 1)(x)])
        elif kind == "depthwise":
            x = L.DepthwiseConv2D(3, padding="same", depth_multiplier=n)(x)
        elif kind == "grouped" and width % 2 == 0:
            x = L.Conv2D(4 * n, 1, groups=2)(x)
        elif kind == "transposed":
            x = L.Conv2DTranspose(6, 3, padding="same")(x)
        elif kind == "norm":
            x = L.LeakyReLU()(L.BatchNormalization()(x))
        elif kind == "shuffle" and width % 2 == 0:
            x = L.Reshape((8, 8, width))(L.Permute((1, 2, 4, 3))(L.Reshape((8, 8, 2, width // 2))(x)))
        elif kind == "gate":
            x = x * L.Dense(width, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))
        elif kind == "halves" and width % 2 == 0:
            one, two = keras.ops.split(x, 2, axis=-1)
            x = one * keras.ops.sigmoid(two)
        elif kind == "groups" and width % 2 == 0:
            x = L.GroupNormalization(width // 2)(x)
        elif kind == "attention":
            flat = L.Reshape((64, width))(x)
            x = L.Reshape((8, 8, width))(flat + L.MultiHeadAttention(2 * n, 3)(flat, flat))
        elif kind == "rows":
            x = L.Reshape((8, 8, 2 * n))(L.GRU(2 * n, return_sequences=True)(L.Reshape((64, width))(x)))
        elif kind == "steps":
            x = L.TimeDistributed(L.Conv1D(4 * n, 3, padding="same", activation="relu"))(x)
        else:
            x = L.Conv2D(8, 1, activation="tanh")(x)
    x = L.Flatten()(x) if is_flat else L.GlobalMaxPooling2D()(x)
    return randomize(keras.Model(i, L.Dense(4)(x)))


@settings(max_examples=8, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    numbers=st.lists(st.integers(1, 2), min_size=4, max_size=4),
    is_flat=st.booleans(),
    sparsity=st.sampled_from([0.3, 0.6]),
)
def test_any_such_model_is_exact_or_says_why_not(kinds, numbers, is_flat, sparsity) -> None:
    model = chain(kinds, numbers, is_flat)
    spec = Prune(sparsity, granularity=Channel(), round_to=1)
    try:
        made, _ = cut(model, images(8, 8, 3), spec)
    except ModelError as refusal:
        assert "remove nothing" in str(refusal)
        return
    assert made.count_params() < model.count_params()
    assert np.isfinite(predict(made, images(8, 8, 3))).all()
