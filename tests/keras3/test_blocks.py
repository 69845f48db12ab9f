"""Whole layers of Keras models: branches of additions, and layers with layers inside."""

import keras
import numpy as np
import pytest
from keras import layers

import whet
from residual_models import KERAS_BLOCKS, TORCH_BLOCKS, data_of, keras_resnet, torch_resnet
from whet.errors import ModelError
from whet.keras.blocks import blocks
from whet.specs import BlockInfluence, Channel, Layer, OutputChange, Prune

X, Y = data_of("keras")
TOKENS = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)


@keras.saving.register_keras_serializable(package="whet_tests")
class TransformerLayer(layers.Layer):
    """As in Keras' own examples: attention and a feed-forward net, each behind a norm of the sum."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 8)
        self.norm1, self.norm2, self.drop = layers.LayerNormalization(), layers.LayerNormalization(), layers.Dropout(0.1)
        self.feed = keras.Sequential([layers.Dense(32, activation="relu"), layers.Dense(16)])

    def build(self, shape):
        self.attention.build(shape, shape)
        for layer in (self.norm1, self.norm2, self.feed):
            layer.build(shape)
        super().build(shape)

    def call(self, x, training=None):
        x = self.norm1(x + self.drop(self.attention(x, x), training=training))
        return self.norm2(x + self.feed(x))


def encoder():
    keras.utils.set_random_seed(0)
    given = x = keras.Input((5, 16))
    for index in range(3):
        x = TransformerLayer(name=f"layer_{index}")(x)
    return keras.Model(given, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


def test_blocks_are_what_additions_add():
    found = blocks(keras_resnet(), X)
    assert tuple(block.name for block in found.blocks) == KERAS_BLOCKS
    first = found.blocks[0]
    assert (
        first.macs == 2 * 8 * 8 * 9 * 64 and first.parameters == 2 * 8 * 8 * 9 + 4 * 8 and first.bytes == 4 * first.parameters
    )
    assert found.skipped == (("add_c", "its shortcut computes (neither operand is worked out of the other)"),)


def test_removal_equals_the_original_whose_branch_is_silent():
    """An oracle of weights: with the last batch norm at zero the branch adds nothing."""
    silent = keras_resnet()
    last = silent.get_layer("add_b").input[0]._keras_history.operation
    last.gamma.assign(np.zeros(8))
    last.beta.assign(np.zeros(8))
    made, _ = blocks(keras_resnet(), X).remove(["add_b"], {})
    assert np.allclose(made.predict(X, verbose=0), silent.predict(X, verbose=0), atol=1e-6)
    assert made.count_params() == silent.count_params() - (2 * 576 + 8 * 8)
    assert "add_b" not in {layer.name for layer in made.layers}


def test_layers_with_layers_inside_leave_whole():
    model = encoder()
    found = blocks(model, TOKENS)
    assert [block.name for block in found.blocks] == ["layer_0", "layer_1", "layer_2"]
    made, _ = found.remove(["layer_1"], {})
    x = model.layers[1](TOKENS)
    expected = model.layers[5](model.layers[4](model.layers[3](x)))
    assert np.allclose(made.predict(TOKENS, verbose=0), expected, atol=1e-6)
    assert made.count_params() == model.count_params() - 2224


def test_what_left_of_custom_layers_is_saved_and_loaded(tmp_path):
    made = whet.prune(encoder(), Prune(granularity=Layer(1), criterion=BlockInfluence()), example=TOKENS, progress=False)
    expected = made.side.predict(made.model, TOKENS)
    folder = made.save(tmp_path / "saved")
    for model in (encoder(), encoder):
        loaded = whet.load(folder, model)
        assert np.array_equal(loaded.side.predict(loaded.model, TOKENS), expected)


def nested():
    """A residual branch inside a model that is used as a layer."""
    keras.utils.set_random_seed(0)
    entry = keras.Input((8, 8, 8))
    inner = entry
    for index in range(2):
        inner = layers.Add()([inner, layers.Conv2D(8, 3, padding="same", name=f"conv_{index}")(inner)])
    body = keras.Model(entry, inner, name="body")
    given = keras.Input((8, 8, 3))
    return keras.Model(given, layers.GlobalAveragePooling2D()(body(layers.Conv2D(8, 1, name="stem")(given))))


def test_masks_and_smaller_channels_follow_their_layers_out_of_nested_models(tmp_path):
    masked = whet.prune(nested(), Prune(0.5), example=X, progress=False)
    assert set(masked.masks) == {"stem/kernel", "body/conv_0/kernel", "body/conv_1/kernel"}
    made = whet.prune(masked, Prune(granularity=Layer(1), include=("body/conv_0",)), progress=False)
    assert {name: mask.shape for name, mask in made.masks.items()} == {
        "stem/kernel": (1, 1, 3, 8),
        "conv_1/kernel": (3, 3, 8, 8),
    }
    kernel = np.asarray(made.model.get_layer("conv_1").kernel)
    assert np.array_equal(kernel == 0, made.masks["conv_1/kernel"] == 0)
    loaded = whet.load(made.save(tmp_path / "saved"), nested())
    assert np.array_equal(loaded.side.predict(loaded.model, X), made.side.predict(made.model, X))


def test_channels_and_layers_leave_in_either_order(tmp_path):
    both = [Prune(0.5, granularity=Channel(), round_to=1), Prune(granularity=Layer(1), include=("add_b",))]
    made = [keras_resnet(), keras_resnet()]
    for first, second in ((0, 1), (1, 0)):
        made[first] = whet.prune(made[first], both[first], example=X, progress=False)
        made[first] = whet.prune(made[first], both[second], progress=False)
    shapes = [sorted(tuple(v.shape) for v in result.float_model.weights) for result in made]
    assert shapes[0] == shapes[1]
    loaded = whet.load(made[0].save(tmp_path / "saved"), keras_resnet())
    assert np.array_equal(loaded.side.predict(loaded.model, X), made[0].side.predict(made[0].model, X))


def test_the_same_weights_matter_as_much_in_pytorch():
    twin, model = torch_resnet(), keras_resnet()
    convs = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    others = [m for name, m in twin.named_modules() if type(m).__name__ == "Conv2d"]
    assert len(convs) == len(others)
    by_shape = {}
    for index in range(len(others)):
        by_shape.setdefault((*others[index].kernel_size, others[index].in_channels, others[index].out_channels), []).append(
            index
        )
    for layer in convs:
        source = others[by_shape[tuple(layer.kernel.shape)].pop(0)]
        layer.kernel.assign(source.weight.detach().numpy().transpose(2, 3, 1, 0))
        if layer.use_bias:
            layer.bias.assign(source.bias.detach().numpy())
    model.layers[-1].kernel.assign(twin.head.weight.detach().numpy().T)
    model.layers[-1].bias.assign(twin.head.bias.detach().numpy())
    spec = Prune(granularity=Layer(1), criterion=OutputChange())
    told = [
        whet.prune(m, spec, train=[data], progress=False).steps[0].control["layers"]
        for m, data in ((twin, data_of("torch")), (model, (X, Y)))
    ]
    found = [[told[0]["importance"][n] for n in TORCH_BLOCKS], [told[1]["importance"][n] for n in KERAS_BLOCKS]]
    assert np.allclose(*found, rtol=1e-4)
    assert TORCH_BLOCKS.index(told[0]["removed"][0]) == KERAS_BLOCKS.index(told[1]["removed"][0])


class Subclassed(keras.Model):
    """Layers in a list, called one after the other; and an addition in its own code."""

    def __init__(self, depth=3, **kwargs):
        super().__init__(**kwargs)
        self.depth, self.stem, self.odd = depth, layers.Dense(16, name="stem"), layers.Dense(16, name="odd")
        self.blocks = [TransformerLayer(name=f"layer_{index}") for index in range(depth)]
        self.pool, self.head = layers.GlobalAveragePooling1D(), layers.Dense(4, name="head")

    def call(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x + self.odd(x)))

    def get_config(self):
        return {"depth": self.depth}


def subclassed():
    keras.utils.set_random_seed(0)
    model = Subclassed()
    model(TOKENS)
    return model


def test_layers_in_a_list_of_a_subclassed_model_leave_it(tmp_path):
    model = subclassed()
    found = blocks(model, TOKENS)
    assert [block.name for block in found.blocks] == ["layer_0", "layer_1", "layer_2"]
    assert any("only layers in a list" in reason for _, reason in found.skipped)
    spec = Prune(granularity=Layer(1), criterion=BlockInfluence(), include=("layer_1",))
    made = whet.prune(model, spec, example=TOKENS, progress=False)
    x = model.blocks[2](model.blocks[0](model.stem(TOKENS)))
    expected = model.head(model.pool(x + model.odd(x)))
    found = made.side.predict(made.model, TOKENS)
    assert np.allclose(found, expected, atol=1e-6) and type(made.model) is Subclassed
    assert len(made.model.blocks) == 2 and made.model.count_params() == model.count_params() - 2224
    again = whet.prune(made, Prune(granularity=Layer(1), include=("layer_0",)), progress=False)
    thin = whet.prune(again, Prune(0.5, granularity=Channel(), round_to=1), progress=False)
    assert [block.name for block in again.model.blocks] == ["layer_2"] and len(model.blocks) == 3
    for result in (made, thin):
        loaded = whet.load(result.save(tmp_path / "saved", overwrite=True), subclassed())
        assert np.array_equal(loaded.side.predict(loaded.model, TOKENS), result.side.predict(result.model, TOKENS))


def test_a_subclassed_model_without_such_a_list_is_refused_by_name():
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.head = layers.Conv2D(3, 3, padding="same"), layers.Flatten()

        def call(self, x):
            return self.head(x + self.conv(x))

    model = Plain()
    model(X)
    with pytest.raises(ModelError, match="only layers in a list of the model can leave"):
        whet.prune(model, Prune(granularity=Layer(1)), example=X, progress=False)
