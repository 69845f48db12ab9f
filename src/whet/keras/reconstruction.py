"""What stays after a removal, solved anew (`graph.reconstruction`) and written back behind its batch norms."""

from __future__ import annotations

from typing import Any

import numpy as np

from whet.data import Batches
from whet.graph.groups import Gone
from whet.graph.reconstruction import Folded, Normed, Reconstructed, Solved, solve
from whet.graph.views import Masks, WeightView
from whet.keras.groups import Reading
from whet.keras.moments import KerasRunner
from whet.keras.quantize import arrays
from whet.keras.sizes import named_weights
from whet.keras.trace import lowered
from whet.keras.views import to_numpy, walk
from whet.specs import Reconstruct


def reconstruct(
    model: Any, reading: Reading, gone: Gone, spec: Reconstruct, *, data: Batches, example: Any, masks: Masks, progress: bool
) -> Reconstructed:
    """*In place*, before the groups that are `gone` leave: weights behind them that make up for it. Weights with `masks` stay
    as they are."""
    program, layers = lowered(model, example), dict(walk(model))
    weights, biases = arrays(program)
    closed = {name: "it has a mask, which holds single weights at zero" for name in masks}
    for norm, layer in program.folds:
        if not (layers[norm].scale and layers[norm].center):
            closed[f"{layer}/kernel"] = f"the batch norm {norm} behind it has no scale and shift of its own"
    some = Batches(data.some(spec.batches, 0), data.what)
    runner = KerasRunner(model, example, some, {})
    folded = Folded(program.graph, tuple(program.folds), weights, biases, closed)
    found = solve(folded, reading.groups, gone, spec, runner, progress)
    norms, own = {layer: norm for norm, layer in program.folds}, named_weights(model)
    shared = {node.weight: node.bias for node in program.graph.nodes}
    for name, solved in found.solved.items():
        layer = name.rpartition("/")[0]
        if layer in norms:
            _behind_norm(own, name, weights[name], layers[norms[layer]], solved)
        else:
            own[name].assign(solved.weight)
            if solved.bias is not None:
                own[str(shared[name])].assign(solved.bias)
    return found


def _behind_norm(own: dict[str, Any], name: str, view: WeightView, norm: Any, solved: Solved) -> None:
    """What was solved, in the layer and the batch norm behind it."""
    bias = own.get(f"{name.rpartition('/')[0]}/bias")
    held = {"mean": norm.moving_mean, "variance": norm.moving_variance, "scale": norm.gamma, "shift": norm.beta}
    held |= {"weight": own[name]} | ({} if bias is None else {"bias": bias})
    values: dict[str, Any] = {key: to_numpy(variable).astype(np.float64) for key, variable in held.items()}
    made = Normed(**{"bias": None, **values}).with_solved(solved, view, norm.epsilon)
    for key, variable in held.items():
        variable.assign(getattr(made, key))
