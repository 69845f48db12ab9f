"""Criteria that look at data: what they see of a Keras model, and what they choose."""

import keras
import numpy as np
import pytest

import whet
from whet import NM, OBS, SNIP, Activation, Channel, Fisher, Global, Movement, Prune, SparseGPT, Taylor, UserCriterion, Wanda
from whet.data import Batches
from whet.errors import SpecError
from whet.keras.inputs import InputReader
from whet.keras.views import kernels, to_numpy

L = keras.layers
QUIET = {"progress": False}
CRITERIA = (Taylor(), SNIP(), Fisher(), Movement(), Wanda(), Activation(), OBS())


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv_net():
    i = keras.Input((6, 6, 4))
    x = L.Conv2D(8, 3, name="a", kernel_initializer=keras.initializers.GlorotUniform(1))(i)
    x = L.BatchNormalization()(x)
    x = L.Conv2D(8, 3, activation="relu", name="b", kernel_initializer=keras.initializers.GlorotUniform(2))(L.ReLU()(x))
    return keras.Model(i, L.Dense(3, name="out", kernel_initializer=keras.initializers.GlorotUniform(3))(L.Flatten()(x)))


DATA = (numbers(64, 6, 6, 4), np.random.default_rng(0).integers(0, 3, 64))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.Conv2D(6, 3, strides=2, padding="same", groups=2, use_bias=False), (3, 7, 7, 4)),
        (L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), (3, 7, 7, 4)),
        (L.Conv1DTranspose(6, 3, strides=2, use_bias=False), (3, 9, 4)),
        (L.Dense(5, use_bias=False), (3, 2, 8)),
        (L.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3)), (3, 5, 4)),
        (L.EinsumDense("abcd,cde->abe", output_shape=(None, 6)), (3, 5, 2, 4)),
    ],
    ids=["conv", "depthwise", "transposed", "dense", "einsum-out", "einsum-in"],
)
def test_the_inputs_of_every_kind_of_layer_make_its_output(layer, shape) -> None:
    """`E|W x|²` by the sums must be the mean square of what the layer computes: columns, groups and layout agree."""
    i = keras.Input(shape[1:])
    model = keras.Model(i, layer(i))
    (kernel,) = kernels(model)
    x = numbers(*shape)
    found = InputReader(model, Batches([x]), 8).sums([kernel.name], True)[kernel.name]
    matrices = found.layout.matrices(to_numpy(kernel.variable).astype(np.float64).reshape(found.layout.shape))
    mean = np.einsum("grc,gcd,grd->gr", matrices, found.hessians() / 2, matrices).ravel()
    out = to_numpy(layer(x)).astype(np.float64)
    kept = 2 if layer.name.startswith("einsum") and out.ndim == 4 else 1
    np.testing.assert_allclose(mean, np.mean(out**2, tuple(range(out.ndim - kept))).ravel(), rtol=1e-5)
    assert found.norms().shape == tuple(kernel.variable.shape) and "call" not in vars(layer)


def test_wanda_by_hand() -> None:
    i = keras.Input((8,))
    model, x = keras.Model(i, L.Dense(3, name="out")(i)), numbers(64, 8) * np.float32(np.arange(1, 9))
    made = whet.prune(model, Prune(0.5, criterion=Wanda()), train=x, **QUIET)
    scores = np.abs(to_numpy(model.get_layer("out").kernel)) * np.sqrt(np.mean(x.astype(np.float64) ** 2, 0))[:, None]
    np.testing.assert_array_equal(made.masks["out/kernel"], np.argsort(np.argsort(scores, axis=0), axis=0) >= 4)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_every_criterion_masks_to_the_weight_and_removes_channels(criterion) -> None:
    model = conv_net()
    made = whet.prune(model, Prune(0.6, criterion=criterion, allocation=Global()), train=DATA, **QUIET)
    sizes = sum(mask.size for mask in made.masks.values())
    assert sum(int((mask == 0).sum()) for mask in made.masks.values()) == round(0.6 * sizes)
    plain = whet.prune(model, Prune(0.6, allocation=Global()), **QUIET)
    assert any((made.masks[name] != plain.masks[name]).any() for name in made.masks)
    smaller = whet.prune(model, Prune(0.5, granularity=Channel(), round_to=1, criterion=criterion), train=DATA, **QUIET)
    assert smaller.model.get_layer("a").filters == smaller.model.get_layer("b").filters == 4


def gradient_is_there(weight, gradient):
    return -abs(weight) if gradient is None else abs(weight)


def test_a_users_function_gets_gradients_where_there_is_data() -> None:
    model, spec = conv_net(), Prune(0.5, criterion=UserCriterion(gradient_is_there))
    with_data, without = whet.prune(model, spec, train=DATA, **QUIET), whet.prune(model, spec, **QUIET)
    assert all(((with_data.masks[n] == 0) == (without.masks[n] == 1)).all() for n in with_data.masks)


@pytest.mark.parametrize("pattern", [{"sparsity": 0.6}, {"granularity": NM(2, 4)}])
def test_sparsegpt_loses_less_than_magnitude_and_changes_what_remains(pattern) -> None:
    mix = numbers(12, 6 * 6 * 4, seed=9)
    x, fresh = ((numbers(512, 12, seed=s) @ mix).reshape(-1, 6, 6, 4) for s in (0, 1))
    model = conv_net()
    before = [to_numpy(weight).copy() for weight in model.weights]
    made = whet.prune(model, Prune(criterion=SparseGPT(), **pattern), train=x, **QUIET)
    plain = whet.prune(model, Prune(**pattern), **QUIET)

    def error(result):
        return float(np.mean((to_numpy(model(fresh)) - to_numpy(result.model(fresh))) ** 2))

    assert error(made) < 0.8 * error(plain)
    for name, mask in made.masks.items():
        weight = to_numpy(made.model.get_layer(name.split("/")[0]).kernel)
        assert not weight[mask == 0].any()
        if "sparsity" in pattern:
            assert (mask == 0).sum() == round(0.6 * mask.size)
        else:
            assert (np.moveaxis(mask, -2, -1).reshape(-1, 4).sum(1) == 2).all()
    assert all(np.array_equal(a, to_numpy(b)) for a, b in zip(before, model.weights, strict=True))


def test_what_cannot_be_seen_or_is_missing_is_named() -> None:
    with pytest.raises(SpecError, match="SparseGPT looks at the inputs of layers: pass batches as train="):
        whet.prune(conv_net(), Prune(0.5, criterion=SparseGPT()), **QUIET)
    i = keras.Input((6, 6, 4))
    model = keras.Model(i, L.SeparableConv2D(4, 3)(i))
    with pytest.raises(SpecError, match="Wanda looks at the inputs of convolutions and linear layers"):
        whet.prune(model, Prune(0.5, criterion=Wanda()), train=DATA[0], **QUIET)
