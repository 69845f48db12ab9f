"""Tracing, calibration, simulation and conversion of Keras models."""

import keras
import numpy as np
import pytest
from keras import layers as L

import zoo_keras
from other_backend import run_under
from whet.data import Batches
from whet.errors import DataError, ModelError
from whet.keras import FakeQuantize, convert, predict, quantize, simulate
from whet.keras.clone import assemble
from whet.keras.trace import lowered
from whet.numerics.affine import QParams
from whet.numerics.affine import quantize as codes_of
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs import TARGETS, Float, Int, PerTensor, Quantize

LITERT = TARGETS["litert"]


def flat(outputs):
    return [np.asarray(item) for item in keras.tree.flatten(outputs)]


def run(model, inputs):
    """Outputs without compiling: faster for models that run once."""
    return flat(model(keras.tree.map_structure(keras.ops.convert_to_tensor, inputs), training=False))


def quantized(model, inputs, spec=None):
    return quantize(model, spec or Quantize(), LITERT, calibration=Batches([inputs]), example=inputs, progress=False)


def state(model):
    nodes = [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    return [np.asarray(v).copy() for v in model.get_weights()], nodes, [layer.name for layer in model._flatten_layers()]


@pytest.mark.parametrize("name", zoo_keras.CASES)
def test_the_zoo_is_traced_exactly_simulated_closely_and_left_untouched(name):
    model, inputs = zoo_keras.CASES[name]()
    before = state(model)
    expected = run(model, inputs)
    for found, wanted in zip(run(assemble(lowered(model, inputs)), inputs), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    plan, step = quantized(model, inputs)
    assert step.changed and plan.values and not step.unmatched
    simulated = run(simulate(model, plan), inputs)
    for found, wanted in zip(simulated, expected, strict=True):
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert 1e-6 < error < 0.06
    for found, wanted in zip(run(convert(model, plan), inputs), simulated, strict=True):
        np.testing.assert_array_equal(found, wanted)
    after = state(model)
    assert all(np.array_equal(a, b) for a, b in zip(before[0], after[0], strict=True)) and before[1:] == after[1:]


def test_the_structure_of_inputs_and_outputs_is_kept():
    model, inputs = zoo_keras.several_outputs()
    plan, _ = quantized(model, inputs)
    outputs = predict(simulate(model, plan), inputs)
    assert sorted(outputs) == ["features", "probability", "score"]
    assert sorted(predict(convert(model, plan), {"extra": inputs["extra"], "image": inputs["image"]})) == sorted(outputs)


def test_a_fused_activation_is_two_operations_and_one_value():
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(3, activation="relu", name="a"), L.Dense(2, activation="softmax", name="b")]
    )
    plan, _ = quantized(model, zoo_keras.images(4))
    assert [node.op for node in lowered(model).graph.nodes] == ["linear", "relu", "linear", "softmax"]
    assert set(plan.values) == {"input:0", "a/relu:0", "b/linear:0", "b/softmax:0"}
    assert float(plan.values["b/softmax:0"].scale) == 1 / 256 and int(plan.values["b/softmax:0"].zero_point) == 0


def test_the_demo_network_is_quantized_from_input_to_logits():
    model, inputs = zoo_keras.digits_cnn()
    plan, step = quantized(model, inputs)
    assert list(plan.weights) == [f"{name}/kernel" for name in ("conv1", "conv2", "hidden", "logits")]
    assert [params.scale.shape for params in plan.weights.values()] == [(10,), (20,), (50,), (10,)]
    assert set(plan.biases) == {"conv1/bias", "conv2/bias", "hidden/bias", "logits/bias"}
    assert plan.biases["conv1/bias"] == ("input:0", "conv1/kernel")
    assert plan.biases["hidden/bias"][0].endswith("/flatten:0") and plan.biases["hidden/bias"][1] == "hidden/kernel"
    assert [row["scheme"] for row in step.changed] == ["int8 per channel"] * 4 and not step.skipped
    assert all(row["error_db"] > 40 for row in step.changed)


def test_a_value_is_the_nearest_code_within_the_calibrated_range():
    layer = FakeQuantize(0.5, 10)
    x = np.array([-100.0, -5.0, -0.3, 0.0, 0.24, 0.25, 0.75, 1000.0], np.float32)  # halves to even
    np.testing.assert_array_equal(np.asarray(layer(x)), np.array([-5.0, -5.0, -0.5, 0.0, 0.0, 0.0, 1.0, 122.5], np.float32))
    away = FakeQuantize(0.5, 128, away=True)
    np.testing.assert_array_equal(
        np.asarray(away(np.array([-0.25, 0.25, 0.75], np.float32))), np.array([-0.5, 0.5, 1.0], np.float32)
    )
    again = FakeQuantize.from_config(away.get_config())
    assert again.get_config() == away.get_config()


@pytest.mark.parametrize("spec", [Int(8), Int(4), Int(8, granularity=PerTensor())])
def test_conversion_stores_the_codes_of_the_folded_weights(spec):
    model, inputs = zoo_keras.residual_add()
    plan, _ = quantized(model, inputs, Quantize(weights=spec))
    program = lowered(model)
    assert len(plan.folds) == 2
    converted = convert(model, plan)
    for name, params in plan.weights.items():
        layer = converted.get_layer(name.split("/")[0])
        stored = {variable.name: np.asarray(keras.ops.convert_to_numpy(variable)) for variable in layer.weights}
        array = np.asarray(program.kernels[name].variable)
        scale, zero = params.broadcast(array.shape)
        assert stored["kernel_codes"].dtype == np.int8 and stored["bias_codes"].dtype == np.int32
        assert np.abs(stored["kernel_codes"]).max() == spec.qmax
        np.testing.assert_array_equal(stored["kernel_codes"], codes_of(array, scale, zero, spec, xp=xp))
        np.testing.assert_array_equal(np.asarray(layer.kernel), stored["kernel_codes"] * scale)
        assert {str(variable.dtype) for variable in layer.weights} == {"int8", "int32", "float32"}
        assert not any(variable.name in ("kernel", "bias") for variable in layer.weights)


def test_batch_norm_is_folded_only_where_it_alone_reads_the_convolution():
    i = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, name="a", use_bias=False)(i)
    y = L.BatchNormalization(name="read_beside")(x)
    z = L.BatchNormalization(name="alone", scale=False)(L.Conv2D(4, 1, name="b")(L.ReLU()(y)))
    w = L.BatchNormalization(name="first")(z)
    model = zoo_keras.randomize(keras.Model(i, [L.Add()([x, y]), w]))
    plan, step = quantized(model, zoo_keras.images())
    assert plan.folds == (("alone", "b"), ("first", "b"))
    assert {"name": "read_beside", "reason": "operation 'batch_norm' is not quantized on litert"} in step.skipped


def test_keep_include_overrides_and_patterns_that_name_nothing():
    model, inputs = zoo_keras.digits_cnn()
    plan, step = quantized(model, inputs, Quantize(keep=("logits", "nowhere"), overrides={"conv2": Int(4)}))
    assert list(plan.weights) == ["conv1/kernel", "conv2/kernel", "hidden/kernel"]
    assert plan.weights["conv2/kernel"].spec.bits == 4
    assert {"name": "logits", "reason": "in keep"} in step.skipped and step.unmatched == ("nowhere",)
    plan, step = quantized(model, inputs, Quantize(include=("conv*",)))
    assert list(plan.weights) == ["conv1/kernel", "conv2/kernel"]
    nested, inputs = zoo_keras.nested_sequential()
    plan, step = quantized(nested, inputs, Quantize(keep=("inner",)))
    assert "conv/kernel" in plan.weights and "inner/conv/kernel" not in plan.weights
    with pytest.raises(ModelError, match=r"would change nothing.*in keep"):
        quantized(model, zoo_keras.images(8, 8, 1), Quantize(keep=("*",)))


def test_a_layer_called_twice_has_one_weight_and_a_value_for_each_call():
    model, inputs = zoo_keras.shared_layer()
    plan, _ = quantized(model, inputs)
    assert [name for name in plan.weights if name.startswith("shared")] == ["shared/kernel"]
    assert [value for value in sorted(plan.values) if value.startswith("shared")] == ["shared/conv:1"]
    assert sum(value.endswith("/relu:0") for value in plan.values) == 1  # the end of the first call


def test_weights_only_needs_no_calibration():
    model, inputs = zoo_keras.residual_add()
    expected = run(model, inputs)[0]
    errors = {}
    for spec in (Int(8), Int(4), Float("float16"), Float("bfloat16")):
        plan, step = quantize(model, Quantize(spec, None), LITERT, calibration=None, example=inputs, progress=False)
        found = run(simulate(model, plan), inputs)[0]
        np.testing.assert_array_equal(found, run(convert(model, plan), inputs)[0])
        errors[spec] = np.abs(found - expected).max()
        assert not plan.values and step.changed
    assert errors[Float("float16")] < errors[Float("bfloat16")] < errors[Int(4)]
    assert errors[Float("float16")] < errors[Int(8)] < errors[Int(4)]


def test_operations_are_named_by_their_place_not_by_the_process():
    graphs = []
    for _ in range(2):
        i = keras.Input((4,))
        x = L.Dense(4, name="a")(i)
        graphs.append(lowered(keras.Model(i, keras.ops.tanh(x + x) + i)).graph)
    assert graphs[0] == graphs[1]
    assert [node.name for node in graphs[0].nodes] == ["a/linear:0", "add/add:0", "tanh/tanh:0", "add_2/add:0"]


def test_missing_and_unsound_calibration():
    model, inputs = zoo_keras.digits_cnn()
    with pytest.raises(DataError, match=r"calibration data"):
        quantize(model, Quantize(), LITERT, calibration=None, example=inputs, progress=False)
    with pytest.raises(DataError, match=r"\(None, 8, 8, 1\)"):
        quantized(model, zoo_keras.images(9, 9, 1))
    i = keras.Input((4,))
    broken = keras.Model(i, L.Dense(2)(keras.ops.log(L.Dense(4)(i))))
    with pytest.raises(DataError, match="not finite"):
        quantized(broken, zoo_keras.images(4))


def test_calibration_unites_all_batches_and_is_deterministic():
    model, inputs = zoo_keras.digits_cnn()
    wide = np.concatenate([inputs, 10 * inputs])
    together, _ = quantize(
        model, Quantize(), LITERT, calibration=Batches([inputs, 10 * inputs]), example=inputs, progress=False
    )
    at_once, _ = quantized(model, wide)
    for name, params in together.values.items():
        np.testing.assert_allclose(params.scale, at_once.values[name].scale, rtol=1e-5)
    assert float(together.values["input:0"].scale) > 5 * float(quantized(model, inputs)[0].values["input:0"].scale)


def test_a_plan_of_another_model_is_refused():
    model, inputs = zoo_keras.digits_cnn()
    plan, _ = quantized(model, inputs)
    other, _ = zoo_keras.residual_add()
    with pytest.raises(ModelError, match=r"another model.*conv1/kernel"):
        simulate(other, plan)


@keras.saving.register_keras_serializable(package="whet_tests")
class Plain(keras.Model):
    """A subclassed model that can be traced."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = L.Dense(6, activation="relu", name="first")
        self.second = L.Dense(3, name="second")

    def call(self, x, training=False):
        return self.second(self.first(x)) + 1.0


@keras.saving.register_keras_serializable(package="whet_tests")
class Branching(Plain):
    """A subclassed model whose calls depend on values."""

    def build(self, input_shape):
        self.first.build(input_shape)
        self.second.build((None, 6))

    def call(self, x, training=False):
        if float(keras.ops.sum(x)) > 0:
            return self.second(self.first(x))
        return self.first(x)


class Scaled(L.Dense):
    """A Dense subclass that computes something else."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training=training)


class Renamed(L.Dense):
    """A Dense subclass that computes what Dense does."""


def test_a_subclassed_model_is_traced_or_refused_with_advice():
    x = zoo_keras.images(4)
    model = Plain()
    expected = np.asarray(model(x))
    plan, _ = quantized(model, x)
    assert list(plan.weights) == ["first/kernel", "second/kernel"]
    np.testing.assert_allclose(run(simulate(model, plan), x)[0], expected, atol=0.1)
    branching = Branching()
    branching(x)
    with pytest.raises(ModelError, match=r"subclassed.*Sequential or functional"):
        quantized(branching, x)


def test_subclasses_of_dense_are_quantized_only_if_they_compute_the_same():
    model = zoo_keras.randomize(
        keras.Sequential([keras.Input((4,)), Renamed(5, name="same"), Scaled(3, name="other"), L.Dense(2, name="last")])
    )
    plan, step = quantized(model, zoo_keras.images(4))
    assert list(plan.weights) == ["same/kernel", "last/kernel"]
    assert {"name": "other", "reason": "operation 'Scaled' is not quantized on litert"} in step.skipped


def test_mixed_precision_models_are_calibrated_and_simulated_in_float32():
    policy = keras.DTypePolicy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), L.Dense(6, activation="relu", dtype=policy), L.Dense(3, dtype=policy)])
    plan, _ = quantized(model, zoo_keras.images(4))
    simulated = simulate(model, plan)
    assert {layer.compute_dtype for layer in simulated.layers} == {"float32"}
    assert run(simulated, zoo_keras.images(4))[0].dtype == np.float32
    assert model.layers[0].compute_dtype == "bfloat16"


def test_dropout_kept_on_at_inference_is_not_taken_for_the_identity():
    i = keras.Input((8,))
    model = keras.Model(i, L.Dense(2)(L.Dropout(0.5)(L.Dense(8)(i), training=True)))
    assert [node.op for node in lowered(model).graph.nodes] == ["linear", "Dropout", "linear"]


def test_all_zero_channels_stay_zero():
    model, inputs = zoo_keras.digits_cnn()
    layer = model.get_layer("conv2")
    kernel = np.asarray(layer.kernel).copy()
    kernel[..., 3] = 0
    layer.kernel.assign(kernel)
    plan, _ = quantized(model, inputs)
    simulated = simulate(model, plan)
    assert not np.asarray(simulated.get_layer("conv2").kernel)[..., 3].any()
    assert all(np.isfinite(item).all() for item in run(simulated, inputs))
    assert isinstance(plan.weights["conv2/kernel"], QParams)


TORCH = """
import sys
import keras, numpy as np, zoo_keras
from whet.data import Batches
from whet.keras import convert, predict, quantize, simulate
from whet.specs import TARGETS, Quantize
assert keras.backend.backend() == "torch"
made = {}
for name in ("digits_cnn", "small_resnet", "depthwise"):
    model, x = zoo_keras.CASES[name]()
    plan, _ = quantize(model, Quantize(), TARGETS["litert"], calibration=Batches([x]), example=x, progress=False)
    made[name] = predict(simulate(model, plan), x)
    assert np.array_equal(made[name], predict(convert(model, plan), x))
np.savez(sys.argv[1], **made)
"""


def test_simulation_on_the_torch_backend_agrees(tmp_path):
    pytest.importorskip("torch")
    run_under("torch", TORCH, tmp_path / "t.npz")
    found = np.load(tmp_path / "t.npz")
    for name in found.files:
        model, inputs = zoo_keras.CASES[name]()
        plan, _ = quantized(model, inputs)
        wanted = run(simulate(model, plan), inputs)[0]
        code = float(max(params.scale for params in plan.values.values()))
        assert np.abs(found[name] - wanted).max() <= code
        assert np.mean(np.abs(found[name] - wanted) < 1e-5) > 0.95
