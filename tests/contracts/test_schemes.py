"""Every scheme of weights, in both frameworks, keeps every promise."""

from functools import cache

import numpy as np
import pytest

import whet
from bench import bench, same, sqnr
from whet import NF4, Dynamic, Float, Int, KMeans, PerGroup, PerTensor, Piecewise, PowerOfTwo, Quantize
from whet.errors import ExportError, TargetError
from whet.runtimes.content import read_dtypes
from whet.runtimes.sessions import open_session

# weights, activations, the type that most bytes of weights are stored in, least SQNR (dB) between file and simulation
SCHEMES = {
    "int8": (Int(8), None, "int8", 40),
    "int4": (Int(4), None, "int4", 40),
    "int3_per_tensor": (Int(3, granularity=PerTensor()), None, "int4", 40),
    "int4_groups": (Int(4, granularity=PerGroup(16)), None, "int4", 40),
    "uint4_groups": (Int(4, symmetric=False, granularity=PerGroup(16)), None, "uint4", 40),
    "int8_ragged_groups": (Int(8, granularity=PerGroup(5)), None, "int8", 100),
    "uint8": (Int(8, symmetric=False), None, "uint8", 40),
    "int12": (Int(12), None, "int16", 100),
    "kmeans": (KMeans(4), None, "uint4", 100),
    "kmeans_groups": (KMeans(3, granularity=PerGroup(16)), None, "uint4", 100),
    "nf4": (NF4(), None, "uint4", 100),
    "powers_of_two": (PowerOfTwo(4), None, "uint4", 100),
    "sums_of_powers": (PowerOfTwo(5, terms=2), None, "uint8", 100),
    "piecewise": (Piecewise(5), None, "uint8", 100),
    "float8": (Float("float8_e4m3"), None, "float8e4m3fn", 100),
    "dynamic": (Int(8), Dynamic(), "int8", 60),
}


def run(name, b, model):
    weights, activations, _, _ = SCHEMES[name]
    spec = Quantize(weights, activations)
    return whet.quantize(model, spec, example=b.data(8)[0], target="onnxruntime", progress=False)


@cache
def made(name, framework):
    b = bench(framework)
    return run(name, b, b.build())


@pytest.fixture(params=SCHEMES)
def name(request):
    return request.param


@pytest.fixture
def result(name, b):
    return made(name, b.name)


def arrays(plan):
    found = {f"{n}/scale": p.scale for n, p in plan.weights.items()}
    found |= {f"{n}/levels": p.levels for n, p in plan.weights.items() if hasattr(p, "levels")}
    return found | {f"{n}/zero": p.zero_point for n, p in plan.weights.items() if hasattr(p, "zero_point")}


def alike(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_input_untouched_and_reproducible(name, result, b):
    model = b.build()
    before = b.frozen(model)
    again = run(name, b, model)
    assert same(before, b.frozen(model))
    assert alike(arrays(again.plan), arrays(result.plan)) and again.plan.dynamic == result.plan.dynamic


def test_twice_is_refused(name, result, b):
    with pytest.raises(whet.WhetError, match="quantized already"):
        run(name, b, result)


def test_converted_computes_as_simulated(result, b):
    inputs, _ = b.data(16, 2)
    side = result.side
    converted = side.predict(result.convert(), inputs)
    assert converted.dtype == np.float32
    assert sqnr(side.predict(result.model, inputs), converted) > 100


def test_serialises(result, b, tmp_path):
    loaded = whet.load(result.save(tmp_path / "saved"), b.build())
    assert alike(arrays(loaded.plan), arrays(result.plan)) and loaded.plan.dynamic == result.plan.dynamic
    inputs, _ = b.data(8, 2)
    assert np.array_equal(loaded.side.predict(loaded.model, inputs), result.side.predict(result.model, inputs))


def test_the_file_stores_and_computes_what_was_asked(name, result, b, tmp_path):
    _, _, kind, bar = SCHEMES[name]
    path = result.export(tmp_path / "model.onnx")
    inputs, _ = b.data(32, 1)
    assert sqnr(result.side.predict(result.model, inputs), np.asarray(open_session(path).run(inputs))) > bar
    stored = read_dtypes(path)["stored"]
    size = {"int4": 0.5, "uint4": 0.5, "int16": 2}.get(kind, 1)
    assert stored[kind] >= size * (54 + 288)
    computed = read_dtypes(path)["computed"]
    assert ("DynamicQuantizeMatMul" in computed or "MatMulIntegerToFloat" in computed) == (name == "dynamic")


@pytest.mark.parametrize("name", ["kmeans", "int4_groups", "float8", "uint8"], indirect=True)
def test_files_that_cannot_hold_it_say_so(name, b, tmp_path):
    target = {"torch": "executorch", "keras": "litert"}[b.name]
    spec = Quantize(SCHEMES[name][0], None)
    compressed = whet.quantize(b.build(), spec, example=b.data(8)[0], target=target, progress=False)
    with pytest.raises(ExportError, match=r"Int\(8"):
        compressed.export(tmp_path / f"model{'.pte' if b.name == 'torch' else '.tflite'}")


def test_targets_without_such_kernels_refuse_dynamic(b):
    for target in {"torch": ("executorch", "openvino"), "keras": ("litert", "openvino")}[b.name]:
        with pytest.raises(TargetError, match="no kernels that quantize activations at run time"):
            whet.quantize(b.build(), Quantize(Int(8), Dynamic()), example=b.data(8)[0], target=target, progress=False)
