"""OpenVINO files from PyTorch models: executed by OpenVINO, their codes read back."""

import dataclasses

import numpy as np
import pytest
import torch

import whet
from torch_files import Exports
from whet.data import Batches
from whet.errors import ExportError, OutputError
from whet.specs import TARGETS, Float, Int, PerTensor, Quantize
from whet.torch import convert, export, predict, quantize, simulate
from zoo_torch import CASES, Branching, normal

ov = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

from whet.runtimes.content import check_integer, read_dtypes  # noqa: E402
from whet.runtimes.sessions import open_session, parts  # noqa: E402

OPENVINO = TARGETS["openvino"]
EXPORTED = [name for name in CASES if name != "branching"]
FILES = Exports(OPENVINO, "xml")
write = FILES.write


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return FILES.once(tmp_path_factory)


def leaves(value):
    """The arrays in a structure, in its order."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


def sqnr(reference, got):
    reference, got = (np.concatenate([leaf.ravel().astype(np.float64) for leaf in leaves(v)]) for v in (reference, got))
    return 10 * np.log10(np.sum(reference**2) / max(np.sum((reference - got) ** 2), 1e-30))


def constants(path):
    """The constants of a file by name."""
    model = ov.Core().read_model(str(path))
    return {node.get_friendly_name(): node.data for node in model.get_ops() if node.get_type_name() == "Constant"}


@pytest.mark.parametrize("name", ["siamese", "recurrent", "attention", "decoder", "pixel_shuffle"])
def test_float_files_return_what_the_model_does(written, name):
    model, inputs, _, path = written(name)
    got, expected = leaves(open_session(path, threads=1).run(inputs)), leaves(predict(model, inputs))
    for mine, its in zip(expected, got, strict=True):
        np.testing.assert_allclose(its, mine, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", EXPORTED)
def test_integer_files_return_what_the_simulation_does(written, name):
    model, inputs, plan, path = written(name, Quantize())
    got = open_session(path, threads=1).run(inputs)
    simulated, plain = predict(simulate(model, plan), inputs), predict(model, inputs)
    assert sqnr(simulated, got) > max(min(sqnr(simulated, plain) + 1, 40), 25)


def test_the_file_holds_our_codes_and_computes_with_them(written):
    model, _, plan, path = written("residual", Quantize())
    stored = constants(path)
    state = convert(model, plan).state_dict()
    assert plan.weights
    for name in plan.weights:
        np.testing.assert_array_equal(stored[name], state[name].numpy())
    assert check_integer(path) == {"integer": len(plan.weights), "float": 0}
    dtypes = read_dtypes(path)
    assert dtypes["stored"]["int8"] == sum(state[name].numel() for name in plan.weights)
    assert "int32" not in dtypes["stored"]
    assert {dtype for dtype in dtypes["computed"]["Convolution"]} == {"uint8/int8"}


def test_biases_are_floats_of_the_values_that_the_simulation_adds(written):
    model, _, plan, path = written("demo", Quantize())
    stored = [array.ravel() for array in constants(path).values() if array.dtype == np.float32]
    tensors = dict(simulate(model, plan).named_parameters())
    assert plan.biases
    for name in plan.biases:
        bias = tensors[name].detach().numpy()
        assert any(array.shape == bias.shape and np.allclose(array, bias, rtol=1e-6, atol=0) for array in stored), name


def test_weights_alone_are_stored_in_integers_and_computed_in_float(written):
    model, inputs, plan, path = written("demo", Quantize(activations=None))
    assert read_dtypes(path)["stored"]["int8"] == sum(
        dict(convert(model, plan).named_buffers())[name].numel() for name in plan.weights
    )
    with pytest.raises(ExportError, match="run in float"):
        check_integer(path)
    np.testing.assert_allclose(
        leaves(open_session(path, threads=1).run(inputs))[0], leaves(predict(simulate(model, plan), inputs))[0], atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_stay_16_bits(written, dtype):
    model, inputs, plan, path = written("demo", Quantize(weights=Float(dtype), activations=None))
    tensors = dict(model.named_parameters())
    assert read_dtypes(path)["stored"][dtype] == 2 * sum(tensors[name].numel() for name in plan.casts)
    np.testing.assert_allclose(
        leaves(open_session(path, threads=1).run(inputs))[0], leaves(predict(simulate(model, plan), inputs))[0], atol=1e-4
    )


def test_layers_that_are_kept_stay_float(written):
    _, _, plan, path = written("demo", Quantize(keep=("*2",)))
    full = Quantize()
    more = written("residual", full)[2]
    assert more.weights and plan.weights
    floats = check_integer(path, float_allowed=9)["float"]
    model = CASES["demo"]()[0]
    layers = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in model.modules())
    assert floats == layers - len(plan.weights)


def test_the_batch_is_dynamic_or_fixed(written, tmp_path):
    _, inputs, _, path = written("demo")
    session = open_session(path, threads=1)
    assert session.fixed_batch is None and session.run(inputs[:3]).shape[0] == 3
    model, inputs = CASES["demo"]()
    export(model, None, OPENVINO, tmp_path / "fixed.xml", example=inputs[:4], dynamic=False)
    fixed = open_session(tmp_path / "fixed.xml", threads=1)
    assert fixed.fixed_batch == 4
    np.testing.assert_allclose(fixed.run(inputs[:6]), session.run(inputs[:6]), rtol=1e-4, atol=1e-5)


def test_files_name_no_place_and_no_tool(written, tmp_path):
    _, _, _, path = written("demo")
    text = path.read_text()
    assert str(tmp_path) not in text and "conversion_parameters" not in text and "\n\t" not in text


def test_control_flow_on_values_is_a_clear_error(tmp_path):
    with pytest.raises(ExportError, match="depend on the values"):
        export(Branching().eval(), None, OPENVINO, tmp_path / "m.xml", example=normal(4, 6))
    assert list(tmp_path.iterdir()) == []


def test_another_targets_plan_is_refused(tmp_path):
    model, inputs = CASES["demo"]()
    plan, _ = quantize(model, Quantize(), OPENVINO, calibration=Batches(inputs), example=inputs, progress=False)
    with pytest.raises(ExportError, match="onnxruntime"):
        export(model, dataclasses.replace(plan, target="onnxruntime"), OPENVINO, tmp_path / "m.xml", example=inputs)


def test_four_bits_in_bytes(written):
    spec = Quantize(weights=Int(4, granularity=PerTensor()))
    model, inputs, plan, path = written("demo", spec)
    got, simulated = open_session(path, threads=1).run(inputs), predict(simulate(model, plan), inputs)
    assert sqnr(simulated, got) > max(sqnr(simulated, predict(model, inputs)), 20)


@pytest.fixture(scope="module")
def made():
    model, inputs = CASES["demo"]()
    return whet.quantize(model, Quantize(), calibration=[inputs], target="openvino", progress=False)


def test_both_files_are_written_or_none(made, tmp_path):
    path = made.export(tmp_path / "m.xml")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    assert parts(path) == [path, tmp_path / "m.bin"]
    before = [item.read_bytes() for item in parts(path)]
    with pytest.raises(OutputError, match="exists"):
        made.export(path)
    path.unlink()
    with pytest.raises(OutputError, match=r"m\.bin.*belongs to 'm\.xml'"):
        made.export(path)
    assert [item.name for item in tmp_path.iterdir()] == ["m.bin"]
    made.export(path, overwrite=True)
    assert [item.read_bytes() for item in parts(path)] == before


def test_evidence_counts_both_files(written):
    _, inputs, _, path = written("demo", Quantize())
    labels = np.zeros(len(inputs), np.int64)
    evidence = whet.measure(path, [(inputs, labels)], progress=False)
    assert evidence.bytes == sum(item.stat().st_size for item in parts(path))
    assert evidence.runtime["name"] == "openvino" and evidence.runtime["precision"] == "float32"
