"""Portable targets: the stored codes leave room for processors without VNNI."""

from dataclasses import replace

import numpy as np
import pytest

from whet.data import Batches
from whet.graph.solve import PORTABLE_BITS
from whet.specs import TARGETS, Int, Quantize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")


def codes(path, plan):
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}
    return {name: stored[name].astype(int) for name in plan.weights}


def written(folder, target, spec=None):
    from whet.torch import export, predict, quantize, simulate
    from zoo_torch import CASES

    model, inputs = CASES["demo"]()
    spec = Quantize() if spec is None else spec
    plan, step = quantize(model, spec, target, calibration=Batches(inputs), example=inputs, progress=False)
    path = folder / f"{target.name}.onnx"
    export(model, plan, target, path, example=inputs)
    return path, plan, step, inputs, predict(simulate(model, plan), inputs)


@pytest.mark.parametrize(
    "target", [TARGETS["onnxruntime-portable"], replace(TARGETS["onnxruntime"], portable=True)], ids=["named", "replaced"]
)
def test_stored_codes_stay_within_63(tmp_path, target):
    from whet.runtimes.sessions import open_session

    path, plan, step, inputs, simulated = written(tmp_path, target)
    found = codes(path, plan)
    assert found
    for array in found.values():
        assert array.min() >= -63 and array.max() <= 63 and np.abs(array).max() == 63
    assert {row["bits"] for row in step.changed} == {PORTABLE_BITS}
    got = open_session(path, threads=1).run(inputs)
    assert (got.argmax(-1) == simulated.argmax(-1)).mean() > 0.95
    # 255 * 63 twice fits into int16, 255 * 127 twice does not: why it is 7 bits and no other number.
    assert 2 * 255 * (2 ** (PORTABLE_BITS - 1) - 1) <= 2**15 - 1 < 2 * 255 * (2**PORTABLE_BITS - 1)


def test_the_ordinary_target_uses_all_codes(tmp_path):
    path, plan, *_ = written(tmp_path, TARGETS["onnxruntime"])
    assert max(np.abs(array).max() for array in codes(path, plan).values()) == 127


def test_fewer_bits_that_were_asked_for_stay(tmp_path):
    path, plan, *_ = written(tmp_path, TARGETS["onnxruntime-portable"], Quantize(Int(4)))
    assert max(np.abs(array).max() for array in codes(path, plan).values()) in (7, 8)
