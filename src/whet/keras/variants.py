"""One copy of a Keras model that computes any part of a plan, one after another: its quantizers can be switched."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from whet.graph.placement import Plan
from whet.keras.clone import Layer, Model, Ref, Tensor, assemble, safe
from whet.keras.model import predict
from whet.keras.quantize import FakeQuantize, bias_codes, round_at_run_time, rounded_weights
from whet.keras.trace import lowered
from whet.keras.variables import named_variables
from whet.keras.views import to_numpy


class Switched(keras.layers.Layer):  # type: ignore[misc]
    """A layer that can be switched off, and then passes its input on; no model has to be built again for that."""

    def __init__(self, layer: Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = layer
        self.on = self.add_weight(shape=(), initializer="zeros", dtype="float32", trainable=False, name="on")
        self.supports_masking = True
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        """`x`, of any shape."""
        return ops.where(self.on > 0.5, self.layer(x), x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape


def variants(model: Model, plan: Plan, example: Any) -> KerasVariants:
    """`model` with its batch norms folded, ready to compute any part of `plan`; `model` is untouched."""
    return KerasVariants(model, plan, example)


class KerasVariants:
    """See `whet.graph.variants.Variants`."""

    def __init__(self, model: Model, plan: Plan, example: Any) -> None:
        self._program = program = lowered(model, example)
        self.graph = program.graph
        self._variables = named_variables(program)
        names = dict.fromkeys((*plan.weights, *plan.biases, *plan.casts, *plan.tensors))
        self._float = {name: to_numpy(self._variables[name]).astype("float32") for name in names}
        self._switches: dict[str, Switched] = {}
        self._calls: dict[str, Switched] = {}
        self._state: dict[str, object] = {}

        def wrapped(name: str, layer: Layer) -> Layer:
            self._calls[name] = Switched(layer, name=f"switched_{layer.name}")
            return self._calls[name]

        def insert(ref: Ref, tensor: Tensor) -> Tensor:
            params = plan.values.get(ref.name)
            if params is None:
                return tensor
            spec = params.spec
            codes = (float(params.scale), int(params.zero_point), spec.bits, spec.symmetric, spec.narrow)
            name = f"quantize_{safe(ref.name)}"
            self._switches[ref.name] = Switched(FakeQuantize(*codes, name=name), name=f"switched_{name}")
            return self._switches[ref.name](tensor)

        round_at_run_time(program, plan, wrapped)
        self._model = assemble(program, insert=insert)
        self.use(plan)

    def use(self, plan: Plan) -> None:
        """Compute as `plan` says from now on: a part of the one that this was made for."""
        for name, own in self._float.items():
            state = (name in plan.weights, name in plan.casts, plan.biases.get(name), name in plan.tensors)
            if self._state.get(name) != state:
                self._state[name] = state
                self._store(plan, name, plan.tensors.get(name, own))
        for name, switch in self._switches.items():
            switch.on.assign(float(name in plan.values))
        for name, switch in self._calls.items():
            switch.on.assign(float(name in plan.dynamic))

    def _store(self, plan: Plan, name: str, array: Any) -> None:
        variable = self._variables[name]
        variable.assign(array.reshape(variable.shape))
        if name in plan.weights or name in plan.casts:
            variable.assign(rounded_weights(self._program, plan, only={name})[name])
        for bias, codes, scale in bias_codes(self._program, plan) if name in plan.biases else ():
            if bias == name:
                variable.assign(codes.astype("float32") * scale)

    def predict(self, inputs: Any) -> Any:
        """Outputs as NumPy arrays in the model's own structure."""
        return predict(self._model, inputs)
