"""PyTorch models that the zoo of architectures does not hold: odd layers, parameters, numbers, outputs. See test_audit.py."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.prune import l1_unstructured

from audit import Row
from zoo_torch import normal

IMAGES, POINTS = normal(16, 3, 8, 8), normal(16, 6)
Pair = namedtuple("Pair", "logits hidden")


@dataclass
class Answer:
    logits: Any
    hidden: Any


class Bare(nn.Module):
    """Parameters of its own that scale and shift channels, and a buffer that does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.scale, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.register_buffer("gain", torch.rand(8, 1, 1) + 0.5)

    def forward(self, x):
        x = F.relu(self.first(x) * self.scale[:, None, None] + self.shift.view(1, -1, 1, 1)) * self.gain
        return self.head(F.relu(self.second(x)).mean((2, 3)))


class Sliced(nn.Module):
    """One parameter that two calls read a half of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(12, 6) * 0.4), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.relu(F.linear(x, self.weight[:6]) + F.linear(x, self.weight[6:])))


class Triangle(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


class TwoReaders(nn.Module):
    """A convolution that a batch norm and another layer read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.left(F.relu(self.norm(x))) + self.right(x)


class OneNorm(nn.Module):
    """A batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.norm(self.second(F.relu(self.norm(self.first(x)))))


class While(nn.Module):
    """As many steps as the values want."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        count = 0
        while x.abs().mean() > 0.2 and count < 5:
            x, count = torch.tanh(self.step(x)) * 0.7, count + 1
        return self.head(x)


class Outputs(nn.Module):
    """Whatever structure of the logits and the hidden layer `shape` makes."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape, self.hidden, self.head = shape, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.hidden(x))
        return self.shape(self.head(h), h)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, y=None, *, z):
        return self.head(F.relu(self.a(x) + self.b(y) + self.a(z)))


class Autocast(nn.Module):
    """Half of it in bfloat16 by its own doing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = F.relu(self.a(x))
        return self.b(x.float())


def used(model: nn.Module) -> nn.Module:
    """`model` with statistics in its batch norms."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model


def convolutions(change: Any = None, norm: Any = None, act: Any = None, before: Any = None) -> Any:
    """Two convolutions; `change` gets both, `norm` and `act` lie between, `before` in front."""

    def build():
        parts = [before()] if before is not None else []
        parts += [nn.Conv2d(3, 8, 3), *([norm()] if norm else []), act() if act else nn.ReLU(), nn.Conv2d(8, 4, 3)]
        model = used(nn.Sequential(*parts))
        if change is not None:
            with torch.no_grad():
                change(parts[0], parts[-1])
        return model, IMAGES

    return build


def linears(change: Any = None, data: Any = POINTS) -> Any:
    """Two linear layers; `change` gets the model."""

    def build():
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        made = model if change is None else change(model)
        return (model if made is None else made), data

    return build


def of(kind: Any, data: Any = POINTS) -> Any:
    return lambda: (used(kind()), data)


def transposed(m):
    m[0].weight = nn.Parameter(torch.randn(6, 6).T)


def shared_storage(m):
    flat = torch.randn(54) * 0.4
    m[0].weight, m[2].weight = nn.Parameter(flat[:36].view(6, 6)), nn.Parameter(flat[36:].view(3, 6))


def zero(first, second):
    first.weight[3], second.weight[1] = 0, 0


def tiny(first, second):
    first.weight[3] = 1e-39
    second.weight[1] *= 1e-30


def huge(first, second):
    first.weight.mul_(1e15)
    second.weight.mul_(1e-10)


def spoil(place: str, value: float) -> Any:
    def change(m):
        with torch.no_grad():
            dict(m.state_dict())[place].view(-1)[4] = value

    return change


def masked(m):
    l1_unstructured(m[0], "weight", amount=0.5)


def exported(m):
    return torch.export.export(m.eval(), (torch.from_numpy(POINTS),)).module()


def encoder():
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)


computed = {"0": "computed"}
unquantized = "not quantized"
ROWS = [
    Row(
        "10 an encoder layer", of(encoder, normal(16, 5, 16)), 2, {"self_attn": unquantized, "norm1": unquantized, "norm2": ""}
    ),
    Row("13 one module at two places", linears(lambda m: nn.Sequential(m[0], m[1], m[0], m[1], m[2])), 2),
    Row("14 own parameters and a buffer per channel", of(Bare, IMAGES), 3),
    Row("15 halves of one weight", of(Sliced), 1, {"": "computed"}),
    Row("16 weight norm, the old one", linears(lambda m: nn.utils.weight_norm(m[0]) and None), 1, computed),
    Row("16 spectral norm", linears(lambda m: nn.utils.parametrizations.spectral_norm(m[0]) and None), 1, computed),
    Row(
        "16 a parametrization of one's own",
        linears(lambda m: nn.utils.parametrize.register_parametrization(m[0], "weight", Triangle()) and None),
        1,
        computed,
    ),
    Row("17 batch norm without scale and offset", convolutions(norm=lambda: nn.BatchNorm2d(8, affine=False)), 2),
    Row(
        "17 batch norm without statistics",
        convolutions(norm=lambda: nn.BatchNorm2d(8, track_running_stats=False)),
        2,
        {"1": unquantized},
    ),
    Row("17 frozen batch norm", convolutions(norm=lambda: nn.BatchNorm2d(8).requires_grad_(False)), 2),
    Row("17 instance norm", convolutions(norm=lambda: nn.InstanceNorm2d(8, affine=True)), 2, {"1": unquantized}),
    Row("17 layer norm", linears(lambda m: nn.Sequential(m[0], nn.LayerNorm(6), m[1], m[2])), 2, {"1": unquantized}),
    Row("17 batch norm first", convolutions(before=lambda: nn.BatchNorm2d(3)), 2, {"0": unquantized}),
    Row("17 a batch norm that does not read alone", of(TwoReaders, IMAGES), 3, {"norm": unquantized}),
    Row("17 one batch norm for two layers", of(OneNorm, IMAGES), 2, {"norm": unquantized}),
    Row("18 sigmoid", convolutions(act=nn.Sigmoid), 2),
    Row("18 GELU", convolutions(act=nn.GELU), 2),
    Row("18 PReLU", convolutions(act=lambda: nn.PReLU(8)), 2, {"1": unquantized}),
    Row("19 an output of probabilities", linears(lambda m: nn.Sequential(*m, nn.Softmax(-1))), 2),
    Row("20 everything frozen", linears(lambda m: m.requires_grad_(False)), 2),
    Row("21 one channel", lambda: (nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3)), IMAGES), 2),
    Row("22 as many steps as the values want", of(While), 2, unwritten="depend on the values of tensors"),
    Row("23 tuple", of(lambda: Outputs(lambda y, h: (y, h))), 2),
    Row("23 named tuple", of(lambda: Outputs(Pair)), 2),
    Row("23 dataclass", of(lambda: Outputs(Answer)), 2),
    Row("23 nested, with None", of(lambda: Outputs(lambda y, h: {"logits": y, "more": [h, (h,)], "none": None})), 2),
    Row("23 by position and by keyword", of(Keywords, {"x": POINTS, "y": POINTS[::-1].copy(), "z": POINTS * 2}), 3),
    Row("25 NaN in a weight", linears(spoil("2.weight", np.nan)), refused=r"2\.weight holds nan at index \(0, 4\)"),
    Row(
        "25 infinite statistics",
        lambda: (spoiled(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))), POINTS),
        refused=r"1\.running_var holds inf at index \(4,\)",
    ),
    Row("26 a channel of zeros", convolutions(zero), 2),
    Row("26 a weight of zeros", convolutions(lambda first, second: second.weight.zero_()), 2),
    Row("26 a channel of denormals", convolutions(tiny), 2),
    Row("26 huge beside tiny", convolutions(huge), 2),
    Row("26 a layer that is always off", convolutions(lambda first, second: first.bias.fill_(-100)), 2),
    Row("26 float16 that underflows", lambda: (convolutions(tiny)()[0].half(), IMAGES), 2),
    Row("28 two inputs as one batch", of(Keywords, (POINTS, POINTS)), refused="missing 1 required"),
    Row("29 a transposed weight", linears(transposed), 2),
    Row("29 weights in one storage", linears(shared_storage), 2),
    Row("29 channels last", lambda: (convolutions()()[0].to(memory_format=torch.channels_last), IMAGES), 2),
    Row("30 bfloat16", lambda: (convolutions(norm=lambda: nn.BatchNorm2d(8))()[0].bfloat16(), IMAGES), 2),
    Row("30 float64", lambda: (convolutions(norm=lambda: nn.BatchNorm2d(8))()[0].double(), IMAGES), 2),
    Row("30 autocast inside", of(Autocast), 2, unwritten="ONNX Runtime .* cannot run"),
    Row("30 no values yet", linears(lambda m: m.to("meta")), refused="meta device.*Load the weights"),
    Row("31 a mask of PyTorch's", linears(masked), 2),
    Row("32 DataParallel", linears(nn.DataParallel), refused=r"pass model\.module"),
    Row("32 compiled", linears(torch.compile), refused=r"torch\.compile.*_orig_mod"),
    Row("32 TorchScript", linears(torch.jit.script), refused="TorchScript"),
    Row("32 traced by FX", linears(torch.fx.symbolic_trace), 2),
    Row("32 an exported program", linears(exported), refused="would change nothing.*linear.default"),
]


def spoiled(model: nn.Module) -> nn.Module:
    spoil("1.running_var", np.inf)(model)
    return model
