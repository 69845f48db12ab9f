"""What recurrent layers and cells of torch do to dimensions: rules for `whet.torch.dimensions`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from whet.graph.ids import Value
from whet.graph.recurrent import cell
from whet.graph.structure import SPATIAL
from whet.torch.calls import Call, shapes


def _recurrent(call: Call) -> list[Value]:
    x, weights = call.value("data" if "data" in call.arguments else "input"), call.listed("params")
    directions, each = 2 if call["bidirectional"] else 1, 4 if call["has_biases"] else 2
    if len(weights) != each * directions * call["num_layers"]:
        raise ValueError("a recurrent layer with a projection")
    states = [value[-1] for value in (call.listed("hx") if isinstance(call["hx"], list) else [call.value("hx")])]
    call.s.fix(x, SPATIAL, range(len(x) - 1))
    features, steps = x[-1], math.prod(map(len, x[:-1]))
    for layer in range(call["num_layers"]):
        made = []
        for k in range(layer * directions, (layer + 1) * directions):
            w = weights[each * k : each * (k + 1)]
            wide, axes = [value[0] for value in w], {"inputs": w[0][1], "recurrent": w[1][1]}
            made.append(cell(call.s, features=features, wide=wide, states=states, steps=steps, layer=call.layer, **axes))
        features = np.concatenate(made)
    out = shapes(call.node)
    after = [(*call.s.fresh(shape[:-1], SPATIAL), made[0]) for shape in out[1:]]
    return [(*call.s.fresh(out[0][:-1], SPATIAL), features), *after]


def _recurrent_cell(call: Call) -> Any:
    x, w, u = call.value("input"), call.value("w_ih"), call.value("w_hh")
    biases = [value[0] for value in (call.maybe("b_ih"), call.maybe("b_hh")) if value is not None]
    before = call.listed("hx") if isinstance(call["hx"], list) else [call.value("hx")]
    hidden = cell(
        call.s,
        features=x[-1],
        inputs=w[1],
        recurrent=u[1],
        wide=[w[0], u[0], *biases],
        states=[value[-1] for value in before],
        steps=math.prod(map(len, x[:-1])),
        layer=call.layer,
    )
    made = [(*x[:-1], hidden) for _ in shapes(call.node)]
    return made if isinstance(call.node.meta.get("val"), list | tuple) else made[0]


RECURRENT: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_cell),
}
