"""What stays after a removal, solved anew (`graph.reconstruction`) and written back behind its batch norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from whet.data import Batches
from whet.graph.groups import Gone
from whet.graph.reconstruction import Folded, Normed, Reconstructed, Solved, solve
from whet.graph.views import Masks, WeightView
from whet.specs import Reconstruct
from whet.torch.groups import Reading
from whet.torch.moments import TorchRunner
from whet.torch.surgery import holders
from whet.torch.trace import trace


def reconstruct(
    model: Any, reading: Reading, gone: Gone, spec: Reconstruct, *, data: Batches, example: Any, masks: Masks, progress: bool
) -> tuple[Reconstructed, list[tuple[Any, Any]]]:
    """*In place*, before the groups that are `gone` leave: weights behind them that make up for it.

    Weights with `masks` stay as they are. Memory that `model` shares with another is not written into: the second result holds
    the changed tensors, and the data that they had.
    """
    traced = trace(model, example, None, progress=False)
    folds, graph = dict(traced.calibration.folds), traced.calibration.graph
    closed = {name: "it has a mask, which holds single weights at zero" for name in masks}
    for norm, layer in folds.items():
        if model.get_submodule(norm).weight is None or model.get_submodule(norm).bias is None:
            closed[f"{layer}.weight"] = f"the batch norm {norm} behind it has no scale and shift of its own"
    some = Batches(data.some(spec.batches, 0), data.what)
    runner = TorchRunner(model, graph, folds, some, {})
    folded = Folded(graph, tuple(folds.items()), traced.weights, traced.biases, closed)
    found = solve(folded, reading.groups, gone, spec, runner, progress)
    norms, biases = {layer: norm for norm, layer in folds.items()}, {node.weight: node.bias for node in graph.nodes}
    before: list[tuple[Any, Any]] = []
    for name, solved in found.solved.items():
        layer = name.rpartition(".")[0]
        if layer in norms:
            _behind_norm(model, name, traced.weights[name], norms[layer], solved, before)
        else:
            bias = {} if solved.bias is None else {str(biases[name]): solved.bias}
            _replace(model, {name: solved.weight, **bias}, before)
    return found, before


def _behind_norm(model: Any, name: str, view: WeightView, path: str, solved: Solved, before: list[Any]) -> None:
    """What was solved, in the layer and the batch norm behind it."""
    bias = f"{name.rpartition('.')[0]}.bias"
    norm = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "shift": "bias"}
    held = {"weight": name, "bias": bias} | {key: f"{path}.{last}" for key, last in norm.items()}
    places = holders(model)
    tensors = {key: places[at][0][0][places[at][0][1]] for key, at in held.items() if at in places}
    values: dict[str, Any] = {key: tensor.detach().double().cpu().numpy() for key, tensor in tensors.items()}
    made = Normed(**{"bias": None, **values}).with_solved(solved, view, model.get_submodule(path).eps)
    _replace(model, {held[key]: getattr(made, key) for key in tensors}, before)


def _replace(model: Any, values: Mapping[str, Any], before: list[tuple[Any, Any]]) -> None:
    """Other memory for the parameters and buffers of these names, which stay the objects that they are."""
    places = holders(model)
    for name, value in values.items():
        where, key = places[name][0]
        tensor = where[key]
        before.append((tensor, tensor.data))
        tensor.data = torch.as_tensor(value).to(tensor.device, tensor.dtype)
