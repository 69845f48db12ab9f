"""Whet's own rules for ONNX: each written form runs in ONNX Runtime and returns what PyTorch does."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from whet.specs import TARGETS
from whet.torch import onnx_program
from whet.torch.onnx_export import build_onnx
from whet.torch.onnx_rules import RULES
from whet.torch.program import trace_program

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

IMAGE, ROWS, WORDS = (4, 6, 6), (6,), (5, 8)


class Applied(nn.Module):
    """A function of one input, with layers where it has some."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def norm(layer):
    """A batch norm with statistics that do something."""
    layer.eps = 0.1  # enough to be missed
    generator = torch.Generator().manual_seed(3)
    for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
        if tensor is not None:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def call(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


def residual_in_place(x, conv):
    y = conv(x)
    z = F.relu_(y)
    z += x
    return y * 2 + z  # y and z are one tensor, the sum is in both


CASES = {
    "conv1d": (WORDS, call, nn.Conv1d(5, 3, 3, padding=1)),
    "conv3d": ((2, 3, 4, 5), call, nn.Conv3d(2, 3, 2, stride=(1, 2, 1))),
    "conv, groups and dilation": (IMAGE, call, nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=(2, 1), bias=False)),
    "conv, same": (IMAGE, call, nn.Conv2d(4, 3, (4, 3), padding="same")),
    "conv, valid": (IMAGE, call, nn.Conv2d(4, 3, 3, padding="valid")),
    "conv transpose": (IMAGE, call, nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)),
    "conv transpose 1d": (WORDS, call, nn.ConvTranspose1d(5, 6, 3, bias=False)),
    "folded norm": (IMAGE, call, nn.Conv2d(4, 3, 3), norm(nn.BatchNorm2d(3))),
    "folded norm, no bias, not affine": (IMAGE, call, nn.Conv2d(4, 3, 3, bias=False), norm(nn.BatchNorm2d(3, affine=False))),
    "norm of a linear layer": (ROWS, call, nn.Linear(6, 5), norm(nn.BatchNorm1d(5)), nn.ReLU(inplace=True)),
    "norm alone": (IMAGE, call, norm(nn.BatchNorm2d(4))),
    "norm and another reader": (IMAGE, lambda x, c, n: c(x) + n(c(x)), nn.Conv2d(4, 4, 1), norm(nn.BatchNorm2d(4))),
    "linear of words": (WORDS, call, nn.Linear(8, 3)),
    "linear of words, no bias": (WORDS, call, nn.Linear(8, 3, bias=False)),
    "linear, no bias": (ROWS, call, nn.Linear(6, 3, bias=False)),
    "tied": (ROWS, lambda x, a: F.linear(a(x), a.weight.t()), nn.Linear(6, 3)),
    "addmm": (ROWS, lambda x, a: torch.addmm(a.bias, x, a.weight.t()), nn.Linear(6, 3)),
    "matmul": (WORDS, lambda x: x @ x.transpose(1, 2)),
    "bmm": (WORDS, lambda x: torch.bmm(x, x.mT)),
    "attention": (WORDS, lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1)),
    "attention, mask": (WORDS, lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.mT, scale=0.3)),
    "layer norm": (WORDS, call, nn.LayerNorm(8)),
    "layer norm of two axes": (WORDS, call, nn.LayerNorm((5, 8), elementwise_affine=False)),
    "activations": (IMAGE, lambda x: sum(f(x) for f in (F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.mish, F.elu, torch.erf))),
    "gelu tanh": (IMAGE, lambda x: F.gelu(x, approximate="tanh")),
    "leaky": (IMAGE, lambda x: F.leaky_relu(x, 0.2) + torch.tanh(x) * torch.sigmoid(x) - torch.abs(-x)),
    "clamps": (IMAGE, lambda x: F.relu6(3 * x) + x.clamp(-0.5, 0.5) + x.clamp(max=0.1) + x.clamp_min(0.3) + F.hardtanh(x)),
    "softmax": (WORDS, lambda x: F.softmax(x, 1) + F.log_softmax(x, dim=-1)),
    "arithmetic": (IMAGE, lambda x: (x + 1) * 2 / (x.abs() + 0.5) - torch.maximum(x, -x) + torch.minimum(x, x**2) + (2 - x)),
    "elementary": (IMAGE, lambda x: torch.sin(x) + torch.cos(x) + torch.exp(x) + torch.log(x**2 + 1) + 1 / (x**2 + 1).sqrt()),
    "max pool": (IMAGE, lambda x: F.max_pool2d(x, 3, 2, padding=1) + F.max_pool2d(x, 2)),
    "avg pool": (IMAGE, lambda x: F.avg_pool2d(x, 3, 2, padding=1) + F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False)),
    "global pool": (
        IMAGE,
        lambda x: F.adaptive_avg_pool2d(x, 1) + x.mean((2, 3), keepdim=True) + x.sum((-1, -2), keepdim=True),
    ),
    "mean of one axis": (IMAGE, lambda x: x.mean(2)),
    "flatten": (IMAGE, lambda x: x.flatten(1) * x.view(x.shape[0], -1) + x.reshape(-1, 4 * 36)),
    "heads": (WORDS, lambda x: x.view(x.shape[0], 5, 2, 4).transpose(1, 2).reshape(x.shape[0], 2, 20)),
    "axes": (WORDS, lambda x: x.unsqueeze(1).squeeze(1).permute(0, 2, 1).unflatten(1, (2, 4)).movedim(1, 3)),
    "cat": (IMAGE, lambda x: torch.cat((x, x * 2, x), 1)),
    "pad": (IMAGE, lambda x: F.pad(x, (1, 2, 0, 1)) + F.pad(x, (1, 2, 0, 1), value=0.5)),
    "crop": (IMAGE, lambda x: F.pad(x, (-1, 0, 0, -2))),
    "slice": (IMAGE, lambda x: x[:, 1:, ::2, -3:-1] + x[:, :3, ::2, 1:3]),
    "select": (IMAGE, lambda x: x[:, 1] + x[:, -1]),
    "parts": (IMAGE, lambda x: torch.cat([*x.chunk(3, 1), *x.split(3, 1), *x.split([1, 3], 1)][::-1], 1)),
    "unbind": (WORDS, lambda x: (lambda a: a[0] * a[1] + a[4])(x.unbind(1))),
    "pixel shuffle": (IMAGE, lambda x: F.pixel_shuffle(x, 2)),
    "casts": (IMAGE, lambda x: x.to(torch.float16).contiguous().to(torch.float32).clone().detach()),
    "identity": (IMAGE, lambda x: (x, x, F.dropout(x, training=False))),
    "in place": (IMAGE, residual_in_place, nn.Conv2d(4, 4, 3, padding=1)),
}


def program_of(model, shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return trace_program(model.eval(), x, None)


@pytest.mark.parametrize("name", CASES)
def test_a_written_program_runs_and_returns_what_pytorch_does(name):
    shape, function, *layers = CASES[name]
    torch.manual_seed(0)
    model = Applied(function, *layers)
    written = onnx_program.write_program(program_of(model, shape))
    assert written is not None, "a rule is missing"
    session = ort.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            expected = model(x.clone())
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for mine, its in zip(expected, got, strict=True):
            assert its.shape == tuple(mine.shape) and its.dtype == mine.numpy().dtype
            np.testing.assert_allclose(its, mine.numpy(), rtol=2e-5, atol=2e-5)


def test_every_rule_is_known_to_pytorch():
    for name in RULES:
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        assert overload in ([""] if not overload else getattr(getattr(torch.ops, space), packet).overloads())


def test_a_folded_norm_is_in_the_weights():
    layers = nn.Conv2d(4, 3, 3), norm(nn.BatchNorm2d(3))
    written = onnx_program.write_program(program_of(Applied(call, *layers), IMAGE))
    assert [node.op_type for node in written.graph.node] == ["Conv"]
    assert sorted(item.name for item in written.graph.initializer) == ["layers.0.weight", "layers.0.weight_bias"]


def test_equal_layers_read_one_stored_weight():
    conv = nn.Conv2d(4, 4, 1)
    other = nn.Conv2d(4, 4, 1)
    other.weight = conv.weight
    written = onnx_program.write_program(program_of(Applied(call, conv, other, norm(nn.BatchNorm2d(4))), IMAGE))
    assert sum(item.name.endswith("weight") and len(item.dims) == 4 for item in written.graph.initializer) == 1


def view_changed(x):
    y = x * 2
    part = y[:, 0]
    y += 1  # seen through `part`, which no ONNX value is
    return part


def part_changed(x):
    y = x * 2
    part = y[:, 0]
    part += 1  # seen through `y`
    return y


def alias_of_alias(x):
    y = x * 2
    z = y.add_(1)
    part = z[:, 0]
    y.mul_(3)
    return part


@pytest.mark.parametrize("function", [view_changed, part_changed, alias_of_alias])
def test_memory_seen_under_two_names_is_left_to_pytorch(function):
    model = Applied(function)
    assert onnx_program.write_program(program_of(model, IMAGE)) is None
    x = torch.randn(2, *IMAGE)
    proto, *_ = build_onnx(model, None, TARGETS["onnxruntime"], example=x.numpy(), dynamic=None)
    got = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, model(x.clone()).numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.avg_pool2d(x, 4, 3, ceil_mode=True),
        lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: x.cumsum(1),
        lambda x: x.expand(x.shape[0], *IMAGE) + torch.arange(x.shape[0]).view(-1, 1, 1, 1),
        lambda x: torch.add(x, x, alpha=2),
    ],
)
def test_what_no_rule_knows_is_written_by_pytorch(function):
    model = Applied(function)
    assert onnx_program.write_program(program_of(model, IMAGE)) is None
    x = torch.randn(3, *IMAGE)
    proto, *_ = build_onnx(model, None, TARGETS["onnxruntime"], example=x.numpy(), dynamic=None)
    got = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-5, atol=1e-6)
