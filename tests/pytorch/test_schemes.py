"""Schemes of weights in PyTorch models: which layers, what their ONNX files hold, and torchao's tensors."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import whet
from bench import sqnr
from torch_parts import Tied, seeded
from whet import NF4, Dynamic, Float, Int, KMeans, PerGroup, Quantize
from whet.runtimes.content import read_content, read_dtypes
from whet.runtimes.sessions import open_session
from whet.torch import to_torchao

IDS = np.random.default_rng(0).integers(0, 11, (4, 7))


class Mixed(nn.Module):
    """Every kind of layer whose weights are quantized alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.conv = nn.Conv1d(32, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose1d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 24)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.lstm(x + self.attention(x, x, x, need_weights=False)[0])[0]
        return self.fc(self.up(torch.relu(self.conv(x.transpose(1, 2)))).transpose(1, 2))


ALONE = {
    "embed.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "conv.weight",
    "up.weight",
    "fc.weight",
}


def mixed():
    return seeded(Mixed).eval()


def quantized(model, weights, activations=None, example=IDS, target="onnxruntime", **more):
    return whet.quantize(model, Quantize(weights, activations, **more), example=example, target=target, progress=False)


@pytest.mark.parametrize("spec", [Int(4), Int(4, symmetric=False, granularity=PerGroup(16)), KMeans(4), Float("float8_e4m3")])
def test_weights_of_every_layer_are_rounded_stored_and_run(spec, tmp_path):
    model = mixed()
    result = quantized(model, spec)
    assert set(result.plan.weights) == ALONE and not result.steps[-1].skipped
    expected = result.side.predict(result.model, IDS)
    found = open_session(result.export(tmp_path / "m.onnx")).run(IDS)
    assert sqnr(expected, np.asarray(found)) > 40
    stored = read_dtypes(tmp_path / "m.onnx")["stored"]
    share = 0.6 if isinstance(spec, KMeans) else 0.2  # a table for each channel weighs more than small codes
    assert stored["float32"] < share * 4 * sum(p.numel() for p in model.parameters())


def test_kept_layers_keep_their_weights_exactly():
    model = mixed()
    result = quantized(model, Int(4), keep=("attention", nn.LSTM))
    assert set(result.plan.weights) == {name for name in ALONE if not name.startswith(("attention", "lstm"))}
    after = dict(result.model.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith(("attention", "lstm")):
            assert torch.equal(parameter, after[name])


def test_a_tied_weight_is_quantized_and_stored_once(tmp_path):
    model, ids = seeded(Tied).eval(), IDS
    result = quantized(model, Int(4), example=ids)
    assert set(result.plan.weights) == {"embed.weight", "hidden.weight"}
    converted = result.convert()
    assert converted.out.weight is converted.embed.weight and converted.embed.weight.dtype == torch.int8
    path = result.export(tmp_path / "m.onnx")
    assert sqnr(result.side.predict(result.model, ids), np.asarray(open_session(path).run(ids))) > 40


def matrix(features=64, out=48, seed=0):
    return seeded(lambda: nn.Sequential(nn.Linear(features, out)), seed).eval(), np.random.default_rng(seed).normal(
        size=(8, features)
    ).astype(np.float32)


@pytest.mark.parametrize("spec", [Int(4, granularity=PerGroup(32)), Int(4), Int(4, symmetric=False, granularity=PerGroup(16))])
def test_int4_linear_is_a_standard_dequantize_with_our_codes(spec, tmp_path):
    model, x = matrix()
    result = quantized(model, spec, example=x)
    path = result.export(tmp_path / "m.onnx")
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    (node,) = [n for n in proto.graph.node if n.op_type == "DequantizeLinear"]
    held = {t.name: t for t in proto.graph.initializer}
    codes = held[node.input[0]]
    assert codes.data_type == (onnx.TensorProto.INT4 if spec.symmetric else onnx.TensorProto.UINT4)
    assert proto.opset_import[0].version == 21
    settings = {a.name: a.i for a in node.attribute}
    grouped = isinstance(spec.granularity, PerGroup)
    assert settings == ({"axis": 0, "block_size": spec.granularity.size} if grouped else {"axis": 1} if settings else {})
    params = result.plan.weights["0.weight"]
    expected = result.plan.encode("0.weight", model[0].weight.detach().numpy())
    assert np.array_equal(onnx.numpy_helper.to_array(codes).astype(np.int32).T, expected)
    scale = onnx.numpy_helper.to_array(held[node.input[1]])
    assert np.array_equal(scale.T.reshape(params.scale.shape), params.scale)
    assert len(codes.raw_data) == 64 * 48 // 2
    assert read_dtypes(path)["computed"] == {"MatMulNBits": {"float32/uint8": 1}}
    assert any("to 8 bits inside" in warning for warning in read_content(path).warnings)
    got = np.asarray(open_session(path).run(x))
    assert sqnr(result.side.predict(result.model, x), got) > 40


def test_int4_linear_runs_in_openvino(tmp_path):
    model, x = matrix()
    result = quantized(model, Int(4, granularity=PerGroup(32)), example=x, target="openvino")
    path = result.export(tmp_path / "m.xml")
    assert read_dtypes(path)["stored"]["int4"] == 64 * 48 // 2
    assert sqnr(result.side.predict(result.model, x), np.asarray(open_session(path).run(x))) > 35
    uneven = quantized(model, Int(4, granularity=PerGroup(24)), example=x, target="openvino")
    with pytest.raises(whet.WhetError, match="64 input features in groups of 24"):
        uneven.export(tmp_path / "uneven.xml")


def test_dynamic_rounds_what_each_linear_layer_reads(tmp_path):
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))).eval()
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    result = quantized(model, Int(8), Dynamic(), example=x)
    assert set(result.plan.dynamic) == {"0/linear:0", "2/linear:0"} and not result.plan.values
    weight = result.plan.rounded("0.weight", model[0].weight.detach().numpy())
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / np.float32(255))
    zero = np.round(-low / scale)
    rounded = (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale
    seen = []
    handle = result.model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().numpy()))
    result.side.predict(result.model, x)
    handle.remove()
    np.testing.assert_allclose(seen[0], rounded @ weight.T + model[0].bias.detach().numpy(), atol=1e-5)
    path = result.export(tmp_path / "m.onnx")
    for rows in (1, 5):
        assert sqnr(result.side.predict(result.model, x[:rows]), np.asarray(open_session(path).run(x[:rows]))) > 80
    with pytest.raises(whet.WhetError, match="rounded to 6 bits"):
        quantized(model, Int(8), Dynamic(6), example=x).export(tmp_path / "six.onnx")


def test_levels_beside_integer_activations_compute_as_simulated(tmp_path):
    model, x = matrix()
    calibration = [x]
    result = whet.quantize(model, Quantize(NF4()), calibration=calibration, target="onnxruntime", progress=False)
    path = result.export(tmp_path / "m.onnx")
    assert result.plan.values and read_dtypes(path)["stored"]["uint4"] == 64 * 48 // 2
    assert sqnr(result.side.predict(result.model, x), np.asarray(open_session(path).run(x))) > 35  # a code here and there


@pytest.mark.filterwarnings("ignore")  # torchao's own, on import
def test_torchao_tensors_hold_our_codes_and_compute_the_same():
    pytest.importorskip("torchao")
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))).eval()
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    uneven = Int(4, granularity=PerGroup(32))  # 48 features
    for spec in (Int(4, granularity=PerGroup(16)), Int(8), Int(3), Int(4, symmetric=False, granularity=PerGroup(16))):
        result = quantized(model, spec, example=x)
        handed = to_torchao(result.float_model, result.plan)
        assert type(handed[0].weight).__module__.startswith("torchao")
        assert torch.equal(handed[0].weight.dequantize(), result.model[0].weight)
        codes = result.plan.encode("0.weight", model[0].weight.detach().numpy())
        shift = 0 if spec.symmetric else 8
        assert np.array_equal(handed[0].weight.qdata.numpy(), codes - shift)
        with torch.no_grad():
            assert torch.equal(handed(torch.from_numpy(x)), result.model(torch.from_numpy(x)))
        assert type(model[0].weight) is nn.Parameter
    with pytest.raises(whet.WhetError, match="48 input features in groups of 32"):
        to_torchao(model, quantized(model, uneven, example=x).plan)
    with pytest.raises(whet.WhetError, match=r"Int\(4, granularity=PerGroup"):
        to_torchao(model, quantized(model, NF4(), example=x).plan)
    with pytest.raises(whet.WhetError, match="activations too"):
        to_torchao(model, quantized(model, Int(8), Dynamic(), example=x).plan)
