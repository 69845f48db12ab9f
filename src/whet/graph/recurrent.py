"""Recurrent cells over ids: a hidden unit leaves with its row of every gate, its state and what reads it."""

from __future__ import annotations

from collections.abc import Sequence

from whet.graph.ids import IntArray
from whet.graph.structure import Structure

GATES = "the gates of a recurrent layer"


def cell(
    s: Structure,
    *,
    features: IntArray,
    inputs: IntArray,
    recurrent: IntArray,
    wide: Sequence[IntArray],
    states: Sequence[IntArray] = (),
    steps: int = 1,
    layer: str = "",
) -> IntArray:
    """The ids of the hidden units of one layer in one direction.

    features: the last axis of what it reads. inputs, recurrent: the axes of its two weights that are summed over. wide: their
    other axes and those of the biases, (gates · units), a gate after another. states: the last axes of its states. steps: how
    often the cell runs, over examples and time.

    Raises:
        ValueError: the sizes do not fit each other, as those of a projected state.
    """
    units = len(recurrent)
    if any(len(axis) % units for axis in wide) or any(len(state) != units for state in states):
        raise ValueError("a recurrent layer with a projection")
    hidden = s.ids.fresh(units)
    for axis in wide:
        s.ids.link(axis, (s.ids.fresh(len(axis) // units, GATES), hidden))
    s.ids.unite(features, inputs)
    for axis in (recurrent, *states):
        s.ids.unite(hidden, axis)
    s.ids.contract(inputs)
    s.ids.contract(recurrent)
    s._count(layer, (steps,), (wide[0], inputs))
    s._count(layer, (steps,), (wide[0], recurrent))
    return hidden
