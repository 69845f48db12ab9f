"""The Keras runner: rows of a matrix product for every layer, moments in the quantized model, values computed once."""

import keras
import numpy as np
import pytest

import zoo_keras
from whet.data import Batches
from whet.errors import DataError
from whet.graph.refine import Request
from whet.keras import predict, quantize, simulate
from whet.keras.moments import Evaluator, KerasRunner
from whet.keras.patches import columns_at, geometry, outputs_at, positions
from whet.keras.quantize import planned
from whet.keras.trace import lowered
from whet.specs import GPTQ, TARGETS, BiasCorrection, Int, Quantize

L = keras.layers
LITERT = TARGETS["litert"]


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: L.Conv2D(6, (3, 2), strides=(2, 1), padding="same"), (7, 6, 4)),
        (lambda: L.Conv2D(6, 3, dilation_rate=2, padding="same", groups=2), (9, 8, 4)),
        (lambda: L.Conv2D(5, 3, strides=2), (8, 9, 2)),
        (lambda: L.Conv1D(3, 4, padding="causal", dilation_rate=2), (11, 2)),
        (lambda: L.DepthwiseConv2D(3, strides=2, depth_multiplier=2, padding="same"), (8, 8, 3)),
        (lambda: L.Conv2DTranspose(4, 3, strides=2, padding="same"), (5, 4, 3)),
        (lambda: L.Conv2DTranspose(4, 2, strides=3), (4, 4, 3)),
        (lambda: L.Conv1DTranspose(2, 5, strides=2, padding="same"), (6, 3)),
        (lambda: L.Dense(4), (5, 3)),
    ],
)
def test_rows_times_the_weight_are_the_layers_output(layer, shape):
    made = layer()
    model = keras.Sequential([keras.Input(shape), made])
    x = numbers((3, *shape))
    kernel, y = np.asarray(made.kernel), np.asarray(model(x))
    where = geometry(
        made, "linear" if isinstance(made, L.Dense) else "conv_transpose" if "Transpose" in type(made).__name__ else "conv"
    )
    at = positions(where, y, 30, seed=1)
    assert 0 < len(at) <= max(30, y.shape[0])
    columns = columns_at(where, x, y.shape[1:-1], at)
    if where.transposed:
        matrices = np.moveaxis(kernel, -2, 0).reshape(1, kernel.shape[-2], -1)
    elif isinstance(made, L.DepthwiseConv2D):
        matrices = kernel.transpose(2, 3, 0, 1).reshape(kernel.shape[2], kernel.shape[3], -1)
    else:
        flat = np.moveaxis(kernel, -1, 0)
        matrices = flat.reshape(where.groups, flat.shape[0] // where.groups, -1)
    found = np.concatenate([c @ m.T for c, m in zip(columns, matrices, strict=True)], axis=1)
    np.testing.assert_allclose(found, outputs_at(where, y, at), atol=1e-5)


def test_moments_are_those_of_all_rows():
    model, x = zoo_keras.residual_add()
    program = lowered(model, x)
    call = next(call for call in program.calls if call.node.op == "conv" and len(call.node.inputs) == 1)
    runner = KerasRunner(model, x, Batches([x[:3], x[3:]]), {})
    (seen,) = runner.regressions(None, [Request(call.node.weight)])[call.node.weight]
    exact = Evaluator(model, program, Batches([x]), None)
    inputs, outputs = (np.asarray(exact.value(0, name)) for name in (call.node.inputs[0], call.node.name))
    where = geometry(call.operation, "conv")
    at = np.arange(outputs.shape[1] * outputs.shape[2])
    (rows,), targets = columns_at(where, inputs, outputs.shape[1:-1], at).astype("float64"), outputs_at(where, outputs, at)
    assert seen.count == len(rows)
    np.testing.assert_allclose(seen.second, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen.cross, targets.astype("float64").T @ rows / len(rows), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(seen.target_mean, targets.mean(0), atol=1e-5)


@pytest.mark.parametrize("name", ["residual_add", "grouped", "depthwise", "shared_layer", "one_dimensional", "attention_layer"])
def test_every_weight_of_the_zoo_has_rows(name):
    model, x = zoo_keras.CASES[name]()
    runner = KerasRunner(model, x, Batches([x]), {})
    requests = [Request(weight) for weight in runner.nodes]
    assert requests and set(runner.regressions(None, requests)) == set(runner.nodes)


def test_the_quantized_program_is_the_simulation():
    model, x = zoo_keras.residual_add()
    spec = Quantize(Int(3), rounding=GPTQ(), correct_bias=BiasCorrection())
    plan, _ = quantize(model, spec, LITERT, calibration=Batches([x]), example=x, progress=False)
    assert plan.codes and plan.tensors
    runner = KerasRunner(model, x, Batches([x]), {})
    _, own = runner.evaluators(plan)
    last = own.program.graph.outputs[0]
    found, wanted = np.asarray(own.value(0, last)), predict(simulate(model, plan), x)
    assert np.mean(np.abs(found - wanted) < 1e-5) > 0.9
    own.forget(set())
    assert set(own.batches[0]) == {last}
    np.testing.assert_array_equal(np.asarray(own.value(0, own.program.graph.nodes[0].name)).shape[0], len(x))  # computed again


def test_a_weight_that_changes_after_it_ran_begins_again():
    model, x = zoo_keras.residual_add()
    plan, _ = quantize(model, Quantize(Int(8)), LITERT, calibration=Batches([x]), example=x, progress=False)
    first, *_, last = [node for node in planned(model, plan).graph.nodes if node.weight in plan.weights]
    runner = KerasRunner(model, x, Batches([x]), {})
    before = runner.regressions(plan, [Request(last.weight)])[last.weight][0]
    codes = np.zeros_like(plan.weights[first.weight].encode(np.asarray(planned(model, plan).kernels[first.weight].variable)))
    plan.codes[first.weight] = codes  # as an algorithm would choose them
    after = runner.regressions(plan, [Request(last.weight)])[last.weight][0]
    assert not np.allclose(before.second, after.second)
    np.testing.assert_array_equal(before.target_mean, after.target_mean)


def test_moments_need_data():
    model, x = zoo_keras.digits_cnn()
    with pytest.raises(DataError, match="calibration"):
        KerasRunner(model, x, None, {}).regressions(None, [Request("conv1/kernel")])
