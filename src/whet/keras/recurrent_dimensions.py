"""What recurrent layers do to dimensions: a hidden unit leaves with its column in every gate and with what reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from whet.graph import moves, recurrent
from whet.graph.ids import IntArray, Value
from whet.graph.structure import SPATIAL
from whet.keras.calls import Call
from whet.keras.dimensions import POINTWISE

L = keras.layers
_CELLS = (L.LSTMCell, L.GRUCell, L.SimpleRNNCell)
_LAYERS = (L.RNN, L.LSTM, L.GRU, L.SimpleRNN)
_MERGES = ("sum", "mul", "ave", "concat", None)


def rule_of(layer: Any) -> Callable[[Call], list[Value]] | None:
    """The rule of a recurrent layer of Keras' own classes, None for others."""
    if type(layer) in _LAYERS:
        return _recurrent
    return _bidirectional if type(layer) is L.Bidirectional else None


def _recurrent(call: Call) -> list[Value]:
    states = call.inputs[1:]
    made = _run(call, call.op, "", states)
    return _outputs(call.op, *made)


def _bidirectional(call: Call) -> list[Value]:
    layer = call.op
    if layer.merge_mode not in _MERGES:
        raise ValueError("a merge of another kind")
    states, half = call.inputs[1:], len(call.inputs) // 2
    one = _outputs(layer.forward_layer, *_run(call, layer.forward_layer, "forward_layer.", states[:half]))
    two = _outputs(layer.backward_layer, *_run(call, layer.backward_layer, "backward_layer.", states[half:]))
    if layer.merge_mode is None:
        return [one[0], two[0], *one[1:], *two[1:]]
    if layer.merge_mode == "concat":
        merged = moves.concat(call.s, [one[0], two[0]], len(one[0]) - 1)
    else:
        merged = call.s.elementwise(one[0], two[0])
    return [merged, *one[1:], *two[1:]]


def _outputs(layer: Any, sequence: Value, units: IntArray) -> list[Value]:
    last: Value = (sequence[0], units)
    states = [last] * (2 if isinstance(layer.cell, L.LSTMCell) else 1)
    return [sequence if layer.return_sequences else last, *(states if layer.return_state else ())]


def _run(call: Call, layer: Any, inside: str, states: list[Value]) -> tuple[Value, IntArray]:
    """The sequence that a recurrent layer makes of the call's first input, and its units.

    Kernels are (inputs, gates · units) and (units, gates · units), gate by gate; biases (…, gates · units). inside: how the
    layer is reached from the called one.
    """
    cell, s = layer.cell, call.s
    if type(cell) not in _CELLS or len(call.x) != 3:
        raise ValueError("a cell of another kind")
    kernel, state_kernel = (call.weight(name, cell) for name in ("kernel", "recurrent_kernel"))
    if kernel is None or state_kernel is None:
        raise ValueError("a cell that is not built")
    bias = call.weight("bias", cell)
    s.fix(call.x, SPATIAL, [1])
    if bias is not None:
        s.fix(bias, recurrent.GATES, range(len(bias) - 1))  # of a GRU two in one
    units = recurrent.cell(
        s,
        features=call.x[2],
        inputs=kernel[0],
        recurrent=state_kernel[0],
        wide=[kernel[1], state_kernel[1], *(() if bias is None else (bias[-1],))],
        states=[state[-1] for state in states],
        steps=len(call.x[0]) * len(call.x[1]),
        layer=call.path,
    )
    if layer.stateful:
        s.ids.fix(units, "the state of a stateful recurrent layer")
    for activation in (cell.activation, getattr(cell, "recurrent_activation", cell.activation)):
        name = str(getattr(activation, "__name__", ""))
        if name not in POINTWISE or activation is not getattr(keras.activations, name, None):
            s.ids.fix(units, f"the activation {name or activation} of {call.path} cannot be followed")
    call.edit(f"{inside}cell.units", lambda count: count(units))
    if isinstance(cell, L.LSTMCell):
        call.edit(f"{inside}cell.state_size", lambda count: (count(units), count(units)))
    else:
        call.edit(f"{inside}cell.state_size", lambda count: count(units))
    call.edit(f"{inside}cell.output_size", lambda count: count(units))
    return (call.x[0], *s.fresh([len(call.x[1])], SPATIAL), units), units
