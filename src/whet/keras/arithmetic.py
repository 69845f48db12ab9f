"""The arithmetic of integer kernels as layers behind operations: values as the runtime has them, to the last bit.

Each layer changes a value by float rounding errors alone; its gradient is 1 in what it was given.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from whet.graph.arithmetic import Accumulator, Sum, arithmetic
from whet.graph.placement import Plan
from whet.keras.clone import Program, Ref, Tensor, safe
from whet.keras.namespace import xp
from whet.numerics.integers import SumMultipliers, fixed_point_sum, requantize


@keras.saving.register_keras_serializable(package="whet")
class Requantize(keras.layers.Layer):  # type: ignore[misc]
    """Accumulators, whole numbers of `step`, at the codes that `factor` makes of them: `round(round(x/step)·factor)·scale`.

    step, factor: one number, or one for each channel along `axis`.
    """

    def __init__(self, step: list[float], factor: list[float], scale: float, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step, self.factor = [float(s) for s in step], [float(f) for f in factor]
        self.scale, self.axis = float(scale), int(axis)
        self.supports_masking = True
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        """`x`, of any shape."""
        shape = [1] * len(x.shape)
        shape[self.axis] = -1
        step, factor = (np.asarray(values, np.float32).reshape(shape) for values in (self.step, self.factor))
        return x + ops.stop_gradient(requantize(x, step, factor, xp=xp) * self.scale - x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        own = {"step": self.step, "factor": self.factor, "scale": self.scale, "axis": self.axis}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="whet")
class FixedPointSum(keras.layers.Layer):  # type: ignore[misc]
    """A sum of two quantized values, of scales `left` and `right`, as kernels with integer multipliers compute it.

    Called on [the sum in float, the left value, the right value]. multipliers: those of `SumMultipliers`, in its order.
    """

    def __init__(self, left: float, right: float, multipliers: list[int], scale: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.left, self.right, self.scale = float(left), float(right), float(scale)
        self.multipliers = SumMultipliers(*(int(number) for number in multipliers))
        self.built = True

    def call(self, tensors: list[Tensor]) -> Tensor:
        """The sum, in the shape of the first."""
        x, left, right = tensors
        codes = fixed_point_sum(ops.round(left / self.left), ops.round(right / self.right), self.multipliers, xp=xp)
        return x + ops.stop_gradient(codes * self.scale - x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the sum."""
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        numbers = self.multipliers
        own = {"left": self.left, "right": self.right, "scale": self.scale}
        return {**super().get_config(), **own, "multipliers": [numbers.left, numbers.right, numbers.shift]}


class Arithmetic:
    """The rules of a plan for the values of a program, which are named to it as they are computed."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self._rules = arithmetic(program.graph, plan)
        self._axes = {
            call.node.name: 1 if getattr(call.operation, "data_format", None) == "channels_first" else -1
            for call in program.calls
        }
        self._tensors: dict[str, Tensor] = {}

    def seen(self, ref: Ref, tensor: Tensor) -> Tensor:
        """`tensor`, which is from now on what readers of `ref` get."""
        self._tensors[ref.name] = tensor
        return tensor

    def computed(self, ref: Ref, tensor: Tensor) -> Tensor:
        """The value `ref` as integer kernels compute it; `tensor` is what float arithmetic makes of it."""
        rule = self._rules.get(ref.name)
        if isinstance(rule, Accumulator):
            axis = self._axes[rule.node.name] if rule.step.ndim else -1
            if rule.step.ndim and rule.step.size != ref.shape[axis]:  # groups of channels that share a scale
                return tensor
            step, factor = np.atleast_1d(rule.step).tolist(), np.atleast_1d(rule.factor).tolist()
            return Requantize(step, factor, rule.scale, axis, name=f"requantize_{safe(ref.name)}")(tensor)
        if isinstance(rule, Sum):
            numbers = [rule.multipliers.left, rule.multipliers.right, rule.multipliers.shift]
            layer = FixedPointSum(rule.left, rule.right, numbers, rule.scale, name=f"sum_{safe(ref.name)}")
            return layer([tensor, *(self._tensors[name] for name in rule.node.inputs)])
        return tensor
