"""The PyTorch bench."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import CLASSES, Bench


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(96, CLASSES)
        self.note = {"made by": "the user"}

    def forward(self, x: Any) -> Any:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1)))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, *, a: Any, b: Any) -> Any:
        h = torch.relu(self.left(a) + self.right(b))
        return {"features": h, "logits": self.head(h)}


class Hook:
    """A user's forward hook; it counts nothing, and is there afterwards."""

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        return None


@cache
def _trained() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
        x, y = (torch.from_numpy(a) for a in BENCH.data(256, seed=5))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def build() -> Any:
    """Flags that differ from layer to layer, a hook and a gradient: what a user may have left in a model."""
    model = copy.deepcopy(_trained())
    model.drop.train()
    model.norm.bias.requires_grad_(False)
    model.head.register_forward_hook(Hook())
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    return model


def state(model: Any) -> Any:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    modules = [
        (name, type(m).__name__, m.training, *(len(getattr(m, hook)) for hook in hooks), sorted(vars(m)), "forward" in vars(m))
        for name, m in model.named_modules()
    ]
    parameters = [
        (n, p.requires_grad, str(p.dtype), id(p), None if p.grad is None else float(p.grad.sum()))
        for n, p in model.named_parameters()
    ]
    return modules, parameters, getattr(model, "note", None), model._compiled_call_impl is None


def seeded(build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build().eval()


def poison(model: Any, value: float) -> None:
    with torch.no_grad():
        model.head.weight[1, 2] = value


def codes(path: Any) -> list[np.ndarray]:
    import onnx

    stored = onnx.load(str(path)).graph.initializer
    return [onnx.numpy_helper.to_array(t) for t in stored if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]


def loader(x: np.ndarray, y: np.ndarray) -> Any:
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    return torch.utils.data.DataLoader(dataset, batch_size=32)


BENCH = Bench(
    name="torch",
    target="onnxruntime",
    suffix=".onnx",
    layer="conv",
    build=build,
    regressor=lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))),
    named=lambda: seeded(Named),
    arrange=lambda x: x[:, None],
    weights=lambda model: {name: value.detach().float().numpy() for name, value in model.state_dict().items()},
    state=state,
    poison=poison,
    codes=codes,
    cast=lambda model: model.to(torch.bfloat16),
    loader=loader,
)
