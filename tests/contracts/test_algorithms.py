"""Every algorithm of quantization, in both frameworks, keeps every promise."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import whet
from bench import bench, same, sqnr
from whet import (
    AWQ,
    GPTQ,
    HQQ,
    MSE,
    AdaRound,
    BiasCorrection,
    CrossLayer,
    Entropy,
    Int,
    MovingAverage,
    Percentile,
    Quantize,
    SmoothQuant,
)
from whet.errors import DataError, SpecError
from whet.runtimes.sessions import open_session

FOUR = Int(4)
ALGORITHMS = {
    "MovingAverage": Quantize(observer=MovingAverage()),
    "Percentile": Quantize(observer=Percentile(99.9)),
    "MSE of values": Quantize(observer=MSE()),
    "Entropy": Quantize(observer=Entropy()),
    "MSE of weights": Quantize(FOUR, weight_observer=MSE()),
    "HQQ": Quantize(Int(4, symmetric=False), None, weight_observer=HQQ()),
    "AdaRound": Quantize(FOUR, rounding=AdaRound(steps=50)),
    "AdaRound, blocks": Quantize(FOUR, rounding=AdaRound(steps=50, blocks=True)),
    "GPTQ": Quantize(FOUR, rounding=GPTQ()),
    "GPTQ, scales of least output error": Quantize(FOUR, rounding=GPTQ(), weight_observer=MSE()),
    "CrossLayer": Quantize(equalize=CrossLayer()),
    "SmoothQuant": Quantize(equalize=SmoothQuant()),
    "AWQ": Quantize(FOUR, None, equalize=AWQ()),
    "BiasCorrection": Quantize(FOUR, correct_bias=BiasCorrection()),
    "BiasCorrection, deviations": Quantize(FOUR, correct_bias=BiasCorrection(batch_norm=True)),
    "BiasCorrection, analytic": Quantize(FOUR, correct_bias=BiasCorrection(analytic=True)),
    "all together": Quantize(
        FOUR, observer=MSE(), equalize=CrossLayer(), rounding=GPTQ(), weight_observer=MSE(), correct_bias=BiasCorrection()
    ),
}
CODES = {name for name, spec in ALGORITHMS.items() if isinstance(spec.rounding, AdaRound | GPTQ)} | {
    "BiasCorrection, deviations"
}
IDLE = {"MovingAverage", "CrossLayer", "SmoothQuant", "AWQ", "BiasCorrection, analytic"}  # perhaps, on so small a model
TARGET = {"progress": False, "target": "onnxruntime"}


def run(name, b, model, data=None, **changes):
    calibration = b.data(64)[0] if data is None else data
    return whet.quantize(model, replace(ALGORITHMS[name], **changes), calibration=calibration, **TARGET)


@cache
def made(name, framework):
    b = bench(framework)
    return run(name, b, b.build())


@pytest.fixture(params=ALGORITHMS)
def name(request):
    return request.param


@pytest.fixture
def result(name, b):
    return made(name, b.name)


def arrays(plan):
    found = {f"{n}/scale": p.scale for n, p in (*plan.weights.items(), *plan.values.items())}
    found |= {f"{n}/zero": p.zero_point for n, p in (*plan.weights.items(), *plan.values.items())}
    return found | {f"{n}/tensor": a for n, a in plan.tensors.items()} | {f"{n}/codes": a for n, a in plan.codes.items()}


def alike(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_the_model_is_untouched_and_a_second_run_gives_the_same_bits(name, result, b):
    model = b.build()
    before, state = b.frozen(model), np.random.get_state()[1].tolist()
    again = run(name, b, model)
    assert same(before, b.frozen(model)) and np.random.get_state()[1].tolist() == state
    assert alike(arrays(again.plan), arrays(result.plan))


def test_the_algorithm_did_something(name, result, b):
    spec = ALGORITHMS[name]
    plain = whet.quantize(b.build(), Quantize(spec.weights, spec.activations), calibration=b.data(64)[0], **TARGET)
    assert name in IDLE or not alike(arrays(result.plan), arrays(plain.plan))
    assert bool(result.plan.codes) == (name in CODES)


def test_plan_simulation_and_file_agree(result, b, tmp_path):
    inputs, _ = b.data(32, 1)
    side = result.side
    simulated = side.predict(result.model, inputs)
    assert sqnr(side.predict(result.float_model, inputs), simulated) > 8
    assert sqnr(simulated, side.predict(result.convert(), inputs)) > 60
    path = result.export(tmp_path / "model.onnx")
    assert sqnr(simulated, np.asarray(open_session(path).run(inputs))) > 35
    for weight, params in result.plan.weights.items():
        codes = result.plan.codes.get(weight)
        assert codes is None or (codes.min() >= params.spec.qmin and codes.max() <= params.spec.qmax)


def test_saved_and_loaded_it_is_the_same(result, b, tmp_path):
    loaded = whet.load(result.save(tmp_path / "saved"), b.build())
    assert alike(arrays(loaded.plan), arrays(result.plan))
    inputs, _ = b.data(8, 2)
    assert np.array_equal(loaded.side.predict(loaded.model, inputs), result.side.predict(result.model, inputs))


def test_kept_layers_stay_float_and_labels_change_nothing(name, result, b):
    labelled = run(name, b, b.build(), b.data(64))
    assert alike(arrays(labelled.plan), arrays(result.plan))
    kept = run(name, b, b.build(), keep=("head",))
    only = run(name, b, b.build(), include=(b.layer,))
    for part in (kept, only):
        assert len(part.plan.weights) == 1 and all(key.startswith(b.layer) for key in part.plan.weights)
        assert all(key.startswith(b.layer) for key in part.plan.codes)


def test_a_second_time_is_refused(name, result, b):
    with pytest.raises(whet.WhetError, match="quantized already"):
        run(name, b, result)


def test_few_examples_do(name, b):
    few = run(name, b, b.build(), b.data(2)[0])
    outputs = few.side.predict(few.model, b.data(16, 1)[0])
    assert np.isfinite(outputs).all() and few.plan.weights.keys() == made(name, b.name).plan.weights.keys()


def test_bad_data_is_refused(name, b):
    x = b.data(8)[0]
    spoiled = x.copy()
    spoiled.flat[5] = np.nan
    for data, said in (([], "empty"), (spoiled, "nan"), (np.zeros((4, 5), np.float32), "4, 5")):
        with pytest.raises(DataError, match=said):
            run(name, b, b.build(), data)


NEEDY = {"GPTQ", "AdaRound", "AWQ", "SmoothQuant", "BiasCorrection"}


@pytest.mark.parametrize("name", sorted(NEEDY), indirect=True)
def test_what_needs_data_says_so(name, b):
    with pytest.raises((DataError, SpecError), match="calibration"):
        spec = replace(ALGORITHMS[name], activations=None)
        whet.quantize(b.build(), spec, example=b.data(8)[0], **TARGET)
