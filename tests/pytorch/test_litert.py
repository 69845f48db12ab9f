"""LiteRT files of PyTorch models: converted by litert-torch, with the plan's own integers, run by LiteRT itself."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

import whet
import zoo_torch
from whet import errors
from whet.runtimes.content import read_dtypes
from whet.runtimes.sessions import open_session
from whet.specs import TARGETS
from whet.torch.litert_export import Marker, export_litert

pytest.importorskip("ai_edge_litert")
LITERT = TARGETS["litert"]
IMAGES = np.random.default_rng(0).normal(size=(64, 3, 12, 12)).astype(np.float32)
converter = pytest.mark.skipif(
    importlib.util.find_spec("litert_torch") is None, reason="litert-torch is not installed: pip install 'whet[litert-torch]'"
)


class Net(nn.Module):
    """Residual sums in place and not, an option-A shortcut, a depthwise convolution, an average pool and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.deep, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        y = self.conv3(x)
        y += nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        y = self.deep(torch.relu_(y))
        return self.head(nn.functional.avg_pool2d(y, 6).flatten(1))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, *, a, b):
        h = torch.relu(self.left(a)) + b
        return {"features": h, "logits": self.head(h)}


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The quantized model and its file."""
    quantized = whet.quantize(seeded(Net), calibration=[IMAGES], target="litert", example=IMAGES[:8], progress=False)
    return quantized, quantized.export(tmp_path_factory.mktemp("litert") / "net.tflite")


@converter
def test_the_file_computes_in_integers_what_the_simulation_does(made):
    quantized, path = made
    session = open_session(path)
    assert session.runtime["kernels"].startswith("XNNPACK")
    expected = whet.torch.predict(quantized.model, IMAGES)
    for rows in (64, 1, 7):
        found = np.asarray(session.run(IMAGES[:rows]))
        assert found.dtype == np.float32 and found.shape == (rows, 5)
        np.testing.assert_allclose(found, expected[:rows], atol=1e-6)
    assert [slot.shape for slot in session.inputs] == [(None, 3, 12, 12)]
    assert [(slot.name, slot.shape) for slot in session.outputs] == [("output", (None, 5))]


@converter
def test_its_operators_are_integer_ones_and_nothing_is_turned_between_them(made):
    computed = read_dtypes(made[1])["computed"]
    assert computed["CONV_2D"] == {"int8": 3} and computed["DEPTHWISE_CONV_2D"] == {"int8": 1}
    assert computed["FULLY_CONNECTED"] == {"int8": 1} and computed["ADD"] == {"int8": 2}
    assert computed["AVERAGE_POOL_2D"] == {"int8": 1}
    assert computed["TRANSPOSE"] == {"int8": 1}  # of the input, channels first


@converter
def test_its_codes_are_ours_bit_for_bit(made):
    from ai_edge_litert import schema_py_generated as schema

    quantized, path = made
    content = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    tensors = [t for t in content.subgraphs[0].tensors if content.buffers[t.buffer].data is not None and t.quantization]
    found = {
        (bytes(content.buffers[t.buffer].data), np.asarray(t.quantization.scale, np.float32).tobytes())
        for t in tensors
        if t.quantization.scale is not None
    }
    plan = quantized.plan
    arrays = Marker(whet.torch.copy(quantized.float_model), plan).arrays
    assert len(plan.weights) == 5
    for name, params in plan.weights.items():
        codes = plan.encode(name, arrays[name]).astype(np.int8)
        order = (1, 2, 3, 0) if name == "deep.weight" else (0, 2, 3, 1) if codes.ndim == 4 else (0, 1)
        assert (np.ascontiguousarray(codes.transpose(order)).tobytes(), params.scale.tobytes()) in found


@converter
def test_a_float_file_equals_the_model(tmp_path):
    model = seeded(Net)
    path = tmp_path / "float.tflite"
    export_litert(model, None, LITERT, path, example=IMAGES[:8], dynamic=False)
    np.testing.assert_allclose(open_session(path).run(IMAGES[:8]), whet.torch.predict(model, IMAGES[:8]), atol=1e-5)
    assert open_session(path).inputs[0].shape == (8, 3, 12, 12)


@converter
def test_several_named_inputs_and_outputs(tmp_path):
    draw = np.random.default_rng(0).normal
    data = {name: draw(size=(48, width)).astype(np.float32) for name, width in (("a", 4), ("b", 8))}
    quantized = whet.quantize(seeded(Named), calibration=[data], target="litert", progress=False)
    session = open_session(quantized.export(tmp_path / "named.tflite"))
    assert {slot.name for slot in session.inputs} == {"a", "b"}
    assert [slot.name for slot in session.outputs] == ["features", "logits"]
    expected = whet.torch.predict(quantized.model, data)
    for one, other in zip(session.run(data), expected.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@converter
@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_torch.CASES)
def test_the_zoo(name, tmp_path):
    """Each model is exported with integers that agree with the simulation, or refused by name."""
    model, inputs = zoo_torch.CASES[name]()
    quantized = whet.quantize(model, calibration=[inputs], target="litert", progress=False)
    try:
        session = open_session(quantized.export(tmp_path / "zoo.tflite"))
    except errors.ExportError as error:
        assert str(error) and name in ("branching", "recurrent", "weight_norm", "fused_qkv")
        return
    found = session.run(inputs)
    expected = whet.torch.predict(quantized.model, inputs)
    pairs = zip(found if isinstance(found, list | tuple) else [found], _flat(expected), strict=True)
    for one, other in pairs:
        assert np.mean(np.abs(one - other) <= 0.02 * np.abs(other).max()) >= 0.95  # float parts before codes: a code off


def _flat(outputs):
    if isinstance(outputs, dict):
        return [array for item in outputs.values() for array in _flat(item)]
    if isinstance(outputs, list | tuple):
        return [array for item in outputs for array in _flat(item)]
    return [outputs]


@converter
def test_what_the_converter_says_is_in_the_error(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    for code, words in (("import os; os.abort()", "signal 6"), ("raise ValueError('no such operator')", "no such operator")):
        broken.write_text(code)
        monkeypatch.setattr("whet.torch.litert_worker.__file__", str(broken))
        with pytest.raises(errors.ExportError, match=f"litert-torch failed on the model 'Net'.*{words}"):
            export_litert(seeded(Net), None, LITERT, tmp_path / "never.tflite", example=IMAGES[:4])
    assert not (tmp_path / "never.tflite").exists()


def test_without_litert_torch_its_extra_is_named(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "litert_torch" else real(name, *rest))
    with pytest.raises(errors.MissingExtraError, match=r"whet\[litert-torch\]"):
        export_litert(seeded(Net), None, LITERT, tmp_path / "m.tflite", example=IMAGES[:4])


@pytest.mark.parametrize("spec", [whet.Quantize(whet.Int(12), None), whet.Quantize(whet.Float("bfloat16"), None)])
def test_what_litert_cannot_hold_is_refused(spec, tmp_path):
    quantized = whet.quantize(seeded(Net), spec, example=IMAGES[:4], target="litert", progress=False)
    with pytest.raises(errors.ExportError, match="LiteRT"):
        export_litert(quantized.float_model, quantized.plan, LITERT, tmp_path / "m.tflite", example=IMAGES[:4])


def test_only_the_batch_can_vary(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    with pytest.raises(errors.ExportError, match=r"dynamic=None .*input:0"):
        export_litert(seeded(Net), None, LITERT, tmp_path / "m.tflite", example=IMAGES[:4], dynamic={"input:0": {2: "h"}})


def test_marked_values_are_those_of_the_plan_and_hold_what_was_computed_before_a_change_in_place():
    model = seeded(Net)
    quantized = whet.quantize(model, calibration=[IMAGES], target="litert", progress=False)
    work = whet.torch.copy(model)
    marker = Marker(work, quantized.plan)
    with torch.no_grad():
        outputs = work(torch.from_numpy(IMAGES[:4]))
        expected = model(torch.from_numpy(IMAGES[:4]))
    assert set(marker.marks) == {name for name in quantized.plan.values if not name.startswith("input:")}
    assert len(outputs) == 1 + len(marker.marks)
    torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)
