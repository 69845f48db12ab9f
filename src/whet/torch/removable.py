"""What may leave a PyTorch model, and its layers alone at any width: for choices that are measured."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from whet.data import Batches
from whet.graph.removable import Removable, may_leave
from whet.graph.selection import eligible
from whet.specs import Prune
from whet.torch.groups import read_model
from whet.torch.importance import scores_of
from whet.torch.model import predict
from whet.torch.surgery import Surgeon

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def removable(model: Any, spec: Prune, *, example: Any, data: Batches | None) -> Removable:
    """The families of `model` that may lose groups, and their scores by the criterion of `spec`; `model` is unchanged.

    Raises:
        ModelError: the model's graph cannot be drawn, or nothing may leave. SpecError: the criterion needs data.
    """
    reading = read_model(model, example, dynamic=spec.rebuild is not None)
    surgeon, found = Surgeon(model, reading, example), eligible(reading.groups, spec)
    refused = {row.family: row.reason for row in surgeon.refusals(found.families)} if spec.rebuild is None else {}
    families, _ = may_leave(found, refused)
    scores = tuple(scores_of(model, list(families), spec.criterion, data))
    return Removable(reading.groups, families, scores, surgeon.silenced, lambda inputs: predict(model, inputs))


@dataclass(frozen=True, slots=True, eq=False)
class TorchLayer:
    """See `whet.graph.removable.TimedLayer`."""

    name: str
    tensor: str
    made: int
    read: int | None
    signature: Hashable
    calls: int
    module: Any
    shape: tuple[int, ...]

    def build(self, made: int, read: int) -> tuple[Any, Any]:
        """A module of this layer alone at these widths, and an example of its input, one row."""
        m, bias = self.module, self.module.bias is not None
        if isinstance(m, nn.Linear):
            layer: Any = nn.Linear(read, made, bias)
            shape = (1, *self.shape[1:-1], read)
        else:
            groups, given = (1, read) if self.read is not None else (made, made)
            layer = type(m)(given, made, m.kernel_size, m.stride, m.padding, m.dilation, groups, bias, m.padding_mode)
            shape = (1, given, *self.shape[2:])
        return nn.Sequential(layer).eval(), np.zeros(shape, np.float32)


def timed_layers(model: Any, example: Any) -> list[TorchLayer]:
    """The convolutions and linear layers that the example runs, each with the shape of its input.

    Grouped convolutions are listed where they are depthwise; other layers have no entry, their times count as constant.
    """
    seen: dict[str, list[tuple[int, ...]]] = {}
    with ExitStack() as stack:
        for name, module in _weighted(model):

            def see(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                first = args[0] if args else next(iter(kwargs.values()))
                seen.setdefault(name, []).append(tuple(int(n) for n in first.shape))

            stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        predict(model, example)
    first_names = {id(tensor): name for name, tensor in reversed(list(model.named_parameters(remove_duplicate=False)))}
    found = []
    for name, module in _weighted(model):
        for shape in dict.fromkeys(seen.get(name, ())):
            depthwise = isinstance(module, _CONVS) and module.groups > 1
            inner = shape[1:-1] if isinstance(module, nn.Linear) else shape[2:]
            sizes = [getattr(module, key, None) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")]
            signature = (type(module).__name__, module.bias is not None, depthwise, inner, *sizes)
            calls = seen[name].count(shape)
            read = None if depthwise else 1
            found.append(TorchLayer(name, first_names[id(module.weight)], 0, read, signature, calls, module, shape))
    return found


def _weighted(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear or (
            type(module) in _CONVS and (module.groups == 1 or module.groups == module.in_channels == module.out_channels)
        ):
            yield name, module


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """*In place*: all weights have the same values after the block as before it."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
