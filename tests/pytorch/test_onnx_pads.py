"""Shortcuts that add channels: written as convolutions, exact in ONNX Runtime, and only where that is the same and small."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import whet
from whet.torch import onnx_program
from whet.torch.program import trace_program

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Wider(nn.Module):
    """`shortcut(x) + conv(x)`, where the convolution's weights are zero unless they are set."""

    def __init__(self, shortcut, channels, width, stride=2):
        super().__init__()
        self.shortcut, self.conv = shortcut, nn.Conv2d(channels, width, 3, stride, 1, bias=False)

    def forward(self, x):
        return self.shortcut(x) + self.conv(x)


def option_a(low, high, rows=2, columns=2):
    return lambda x: F.pad(x[:, :, ::rows, ::columns], (0, 0, 0, 0, low, high))


def written(model, x):
    """Operators of the file, and what ONNX Runtime makes of `x` with it."""
    proto = onnx_program.write_program(trace_program(model.eval(), x, None))
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [node.op_type for node in proto.graph.node], *session.run(None, {session.get_inputs()[0].name: x.numpy()})


class Several(nn.Module):
    """The sums of many shortcuts of one image."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


def test_widening_shortcuts_are_one_exact_convolution_each():
    """Every amount below and above, every stride: bit for bit, as the branch beside the shortcut adds zeros."""
    drawn, parts = random.Random(0), []
    for rows, columns in itertools.product((1, 2, 3), repeat=2):
        low, high = drawn.randint(0, 4), drawn.randint(1, 4)
        parts.append(Wider(option_a(low, high, rows, columns), 3, 3 + low + high, (rows, columns)))
        nn.init.zeros_(parts[-1].conv.weight)
    model, x = Several(*parts), torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    operators, *found = written(model, x)
    assert sorted(operators) == ["Add"] * 9 + ["Conv"] * 18
    for mine, its in zip(found, model(x), strict=True):
        np.testing.assert_array_equal(mine, its.detach().numpy())


def test_with_the_branch_beside_it_the_sum_is_pytorchs():
    torch.manual_seed(0)
    model, x = Wider(option_a(4, 4), 8, 16), torch.randn(3, 8, 9, 9)
    operators, found = written(model, x)
    assert sorted(operators) == ["Add", "Conv", "Conv"]
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_pooled_shortcut_is_widened_by_a_convolution_too():
    torch.manual_seed(0)
    model, x = Wider(lambda x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 8)), 8, 16), torch.randn(2, 8, 8, 8)
    operators, found = written(model, x)
    assert sorted(operators) == ["Add", "AveragePool", "Conv", "Conv"]
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def read_twice(x):
    part = x[:, :, ::2, ::2]
    return F.pad(part, (0, 0, 0, 0, 4, 4)) + part.mean((1, 2, 3), keepdim=True)


KEPT = {
    "another value": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), value=1.0),
    "rows too": lambda x: F.pad(x[:, :, ::2, ::2][:, :, 1:], (0, 0, 1, 0, 4, 4)),
    "fewer below": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, -2, 10)),
    "not read by the sum": lambda x: F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_pads_stay_pads(name):
    torch.manual_seed(0)
    model, x = Wider(KEPT[name], 8, 16), torch.randn(2, 8, 8, 8)
    operators, found = written(model, x)
    assert operators.count("Pad") == 1 and operators.count("Conv") == 1 and "Slice" in operators
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_slice_that_others_read_or_that_starts_later_stays_before_the_convolution():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 8)
    for shortcut in (read_twice, lambda x: F.pad(x[:, :, 1::2, ::2], (0, 0, 0, 0, 4, 4))):
        model = Wider(shortcut, 8, 16)
        operators, found = written(model, x)
        assert "Slice" in operators and "Pad" not in operators
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_shortcut_too_wide_for_a_small_convolution_stays_a_pad():
    model, x = Wider(option_a(32, 33), 64, 129), torch.randn(2, 64, 4, 4)
    operators, _ = written(model, x)
    assert operators.count("Pad") == 1 and operators.count("Conv") == 1


def test_a_quantized_shortcut_moves_codes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Wider(option_a(4, 4), 8, 16)).eval()
    x = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    made = whet.quantize(model, calibration=[x], target="onnxruntime", progress=False)
    made.export(tmp_path / "model.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count("Conv") == 2 and "Pad" in operators
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    np.testing.assert_allclose(found, made.side.predict(made.model, x), atol=0.02 * np.abs(found).max())
