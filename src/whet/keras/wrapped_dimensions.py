"""What `TimeDistributed` does to dimensions: those of the layer in it, at every step alike."""

from __future__ import annotations

from collections.abc import Callable

import keras

from whet.graph.ids import Value
from whet.graph.structure import SPATIAL
from whet.keras import dimensions
from whet.keras.calls import Call, Layer
from whet.keras.sizes import BUILT

L = keras.layers
_FOLLOWED = (
    *(L.Dense, L.Conv1D, L.Conv2D, L.Conv3D, L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose),
    *(L.DepthwiseConv1D, L.DepthwiseConv2D, L.SeparableConv1D, L.SeparableConv2D, L.LayerNormalization, L.RMSNormalization),
    *(L.Activation, L.ReLU, L.LeakyReLU, L.ELU, L.Dropout, L.GlobalAveragePooling1D, L.GlobalAveragePooling2D),
    *(L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.MaxPooling1D, L.MaxPooling2D, L.AveragePooling1D, L.AveragePooling2D),
)


def rule_of(layer: Layer) -> Callable[[Call], Value] | None:
    """The rule of a TimeDistributed whose layer can be followed, None for others."""
    if type(layer) is not L.TimeDistributed or not isinstance(layer.layer, _FOLLOWED):
        return None
    return None if dimensions.rule_of(layer.layer) is None else _time_distributed


class _Step(Call):
    """The call of the layer inside: steps count as rows."""

    def __init__(self, outer: Call) -> None:
        self.reader, self.s, self.op, self.name = outer.reader, outer.s, outer.op.layer, outer.name
        self.path = f"{outer.path}/{self.op.name}"
        self.reader.operations[self.path] = self.op
        self.args, self.kwargs = (), {}
        rows = len(outer.x[0]) * len(outer.x[1])
        self.shapes = [(rows, *outer.shape[2:])]
        self._value: Value = (*self.s.fresh([rows], SPATIAL), *outer.x[2:])
        self.edit(BUILT, lambda count: (None, *(count(axis) for axis in outer.x[2:])))

    @property
    def inputs(self) -> list[Value]:
        """The ids of what one step reads."""
        return [self._value]


def _time_distributed(call: Call) -> Value:
    """(rows, steps, …): the rule of the layer inside on (rows · steps, …), and the steps behind the rows again."""
    rule = dimensions.rule_of(call.op.layer)
    if rule is None or len(call.inputs) != 1:
        raise ValueError("a mask, or a layer that cannot be followed")
    call.s.fix(call.x, SPATIAL, [1])
    made = rule(_Step(call))
    return (call.x[0], *call.s.fresh([call.shape[1]], SPATIAL), *made[1:])
