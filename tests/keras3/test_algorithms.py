"""Post-training algorithms on Keras models: the output error falls, the float model stays, nothing is left out in silence."""

import keras
import numpy as np
import pytest

import zoo_keras
from whet.data import Batches
from whet.errors import DataError
from whet.keras import convert, predict, quantize, simulate
from whet.keras.quantize import quantized_view
from whet.keras.trace import lowered
from whet.specs import (
    AWQ,
    GPTQ,
    MSE,
    TARGETS,
    AdaRound,
    BiasCorrection,
    CrossLayer,
    Entropy,
    Int,
    MinMax,
    MovingAverage,
    Percentile,
    PerTensor,
    Quantize,
    SmoothQuant,
)

L = keras.layers
LITERT = TARGETS["litert"]


def flat(outputs):
    return [np.asarray(item) for item in keras.tree.flatten(outputs)]


def quantized(model, x, spec):
    return quantize(model, spec, LITERT, calibration=Batches([x]), example=x, progress=False)


def db(model, x, plan):
    wanted, found = flat(predict(model, x))[0], flat(predict(simulate(model, plan), x))[0]
    return float(10 * np.log10(np.sum(wanted**2) / np.sum((found - wanted) ** 2)))


@pytest.mark.parametrize("name", ["residual_add", "depthwise", "dense_reshape_transposed"])
@pytest.mark.parametrize("rounding", [GPTQ(), AdaRound(steps=100)])
def test_rounding_on_data_lowers_the_output_error(name, rounding):
    model, x = zoo_keras.CASES[name]()
    before = model.get_weights()
    nearest, _ = quantized(model, x, Quantize(Int(3)))
    plan, step = quantized(model, x, Quantize(Int(3), rounding=rounding, correct_bias=BiasCorrection()))
    assert db(model, x, plan) > db(model, x, nearest) + 5
    rows = [row for row in step.changed if "output_db" in row]
    assert rows and all(row["algorithm"] == type(rounding).__name__ for row in rows)
    assert all(row["output_db"] > row["nearest_db"] - 0.1 for row in rows)  # the damped error never rises
    assert plan.codes and plan.tensors  # codes that are not the nearest, biases that were corrected
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    np.testing.assert_array_equal(flat(predict(convert(model, plan), x))[0], flat(predict(simulate(model, plan), x))[0])


def test_blocks_are_learned_where_that_lowers_their_error():
    model, x = zoo_keras.small_resnet()
    plan, step = quantized(model, x, Quantize(Int(3), rounding=AdaRound(blocks=True, steps=200)))
    pairs = [row["block_db"] for row in step.changed if "block_db" in row]
    assert pairs and all(after >= before for before, after in pairs) and any(after > before for before, after in pairs)
    for name, codes in plan.codes.items():
        params = plan.weights[name]
        assert codes.min() >= params.spec.qmin and codes.max() <= params.spec.qmax


def test_removed_weights_stay_zero_in_the_codes():
    model, x = zoo_keras.digits_cnn()
    layer = model.get_layer("conv2")
    kernel = np.asarray(layer.kernel).copy()
    kernel[np.abs(kernel) < np.median(np.abs(kernel))] = 0
    layer.kernel.assign(kernel)
    for rounding in (GPTQ(), AdaRound(steps=50)):
        plan, _ = quantized(model, x, Quantize(Int(4), rounding=rounding))
        codes = plan.encode("conv2/kernel", kernel)
        assert not codes[kernel == 0].any() and codes[kernel != 0].any()


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(0.5), Percentile(99), MSE(), Entropy()])
def test_observers_range_activations(observer):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype("float32")
    x[0, 0] = 60.0  # an outlier
    model = keras.Sequential([keras.Input((8,)), L.Dense(5, name="a")])
    spec = Quantize(Int(8), Int(4, symmetric=False, granularity=PerTensor()), observer=observer)
    batches = Batches([x[:128], x[128:]])
    plan, _ = quantize(model, spec, LITERT, calibration=batches, example=x, progress=False)
    top = float(plan.values["input:0"].scale) * (15 - int(plan.values["input:0"].zero_point))
    if isinstance(observer, MinMax):
        assert top == pytest.approx(60, rel=0.05)
    elif isinstance(observer, MovingAverage):  # half of each batch's greatest value
        assert top == pytest.approx((60 + x[128:].max()) / 2, rel=0.07)
    else:
        assert 1 < top < 55


def test_cross_layer_equalization_mends_unequal_channels():
    model, x = zoo_keras.digits_cnn()
    first, second = model.get_layer("conv1"), model.get_layer("conv2")
    factors = np.geomspace(0.01, 100, first.filters).astype("float32")
    first.kernel.assign(np.asarray(first.kernel) * factors)
    first.bias.assign(np.asarray(first.bias) * factors)
    second.kernel.assign(np.asarray(second.kernel) / factors[:, None])
    tensor = Int(8, granularity=PerTensor())
    plain, _ = quantized(model, x, Quantize(tensor))
    equal, step = quantized(model, x, Quantize(tensor, equalize=CrossLayer()))
    assert db(model, x, equal) > db(model, x, plain) + 10
    assert {"conv1/kernel", "conv1/bias", "conv2/kernel"} <= set(equal.tensors) and step.changed


@pytest.mark.parametrize("equalize", [SmoothQuant(0.5), AWQ(points=8)])
def test_outliers_behind_a_norm_move_into_the_weights(equalize):
    rng = np.random.default_rng(0)
    i = keras.Input((6, 16))
    y = L.LayerNormalization(name="norm")(i)
    model = keras.Model(i, [L.Dense(8, name="q")(y), L.Dense(8, name="k")(y)])
    factors = np.ones(16, "float32")
    factors[:2] = 60  # channels that every token has large, as in language models
    model.get_layer("norm").gamma.assign(factors)
    for name in ("q", "k"):
        layer = model.get_layer(name)
        layer.kernel.assign((rng.normal(size=(16, 8)) / np.maximum(factors, 1)[:, None]).astype("float32"))
    x = rng.normal(size=(32, 6, 16)).astype("float32")
    spec = Quantize(Int(4)) if isinstance(equalize, AWQ) else Quantize()
    plain, _ = quantized(model, x, spec)
    better, step = quantized(model, x, Quantize(spec.weights, equalize=equalize))
    assert {"norm/gamma", "q/kernel", "k/kernel"} <= set(better.tensors) and not step.unmatched
    assert np.abs(better.tensors["norm/gamma"] - factors).max() > 1
    assert db(model, x, better) > db(model, x, plain) + 3


def test_analytic_correction_uses_batch_norms_and_says_where_it_cannot():
    i = keras.Input((8, 8, 3))
    y = L.ReLU()(L.BatchNormalization(name="n1")(L.Conv2D(8, 3, name="a")(i)))
    model = keras.Model(i, L.BatchNormalization(name="n2")(L.Conv2D(6, 3, name="b")(y)))
    zoo_keras.randomize(model)
    plan, step = quantized(model, zoo_keras.images(8, 8, 3), Quantize(Int(3), correct_bias=BiasCorrection(analytic=True)))
    assert set(plan.tensors) == {"b/bias"}
    assert any(row["name"] == "a" and "bias correction" in row["reason"] for row in step.skipped)
    view = quantized_view(lowered(model).kernels["b/kernel"])
    assert plan.tensors["b/bias"].shape == (6,) and view.array.shape[-1] == 6


def test_layers_are_named_by_their_class_and_a_shared_one_is_rounded_once():
    model, x = zoo_keras.shared_layer()
    plan, _ = quantized(model, x, Quantize(Int(4), rounding=GPTQ(), include=(L.Conv2D,)))
    assert plan.weights and all(type(model.get_layer(name.split("/")[0])) is L.Conv2D for name in plan.weights)
    assert [name for name in plan.weights if name.startswith("shared")] == ["shared/kernel"]
    plan, step = quantized(model, x, Quantize(keep=(L.Dense,)))
    assert all("Dense" not in type(model.get_layer(name.split("/")[0])).__name__ for name in plan.weights)
    assert any(row["reason"] == "in keep" for row in step.skipped) or not any(isinstance(la, L.Dense) for la in model.layers)


def test_algorithms_without_data_are_refused():
    model, x = zoo_keras.digits_cnn()
    for spec in (Quantize(Int(4), None, rounding=GPTQ()), Quantize(Int(4), None, equalize=SmoothQuant())):
        with pytest.raises(DataError, match="calibration="):
            quantize(model, spec, LITERT, calibration=None, example=x, progress=False)
