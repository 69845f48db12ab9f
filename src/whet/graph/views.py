"""Weights as views: the difference between Keras kernels (…, in, out) and torch weights (out, in, …) is removed once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whet.numerics.namespace import Array

Masks = dict[str, npt.NDArray[np.uint8]]  # weight name -> 1 where kept, in the weight's own layout


@dataclass(frozen=True, slots=True, eq=False)
class WeightView:
    """One weight of a layer.

    name: the parameter's name (`conv1.weight`, `conv2d/kernel`). layer: the layer that users name in keep and include.
    array: its values, in the framework's own layout and array type. out_axis: the axis of output channels; in_axis:
    of input channels (None where there is none, as in a depthwise kernel).
    """

    name: str
    layer: str
    array: Array
    out_axis: int
    in_axis: int | None
