"""The simulation of a quantized Keras model: its program with rounded weights, and quantizers behind its values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from whet.errors import ModelError
from whet.graph.nodes import Node
from whet.graph.placement import Plan
from whet.graph.views import WeightView
from whet.keras.arithmetic import Arithmetic
from whet.keras.clone import Call, Model, Program, Ref, Tensor, assemble, renamed, safe
from whet.keras.namespace import xp
from whet.keras.trace import lowered
from whet.keras.variables import named_variables
from whet.keras.views import Kernel, to_numpy
from whet.numerics.affine import QParams, dynamic_rounded, fake_quantize, quantize_bias
from whet.specs import Int

TIE = 1e-4  # what float arithmetic may take from a mean that is half a code


@keras.saving.register_keras_serializable(package="whet")
class FakeQuantize(keras.layers.Layer):  # type: ignore[misc]
    """What an integer tensor holds, in float: `scale * (clip(round(x / scale) + zero_point) - zero_point)`.

    Per tensor, with the straight-through gradient. bits, symmetric and narrow are those of `Int`. `away=True` rounds halves
    of the signed codes away from zero, as LiteRT's average pooling does.
    """

    def __init__(
        self,
        scale: float,
        zero_point: int,
        bits: int = 8,
        symmetric: bool = False,
        narrow: bool | None = None,
        away: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.away = bool(away)
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.codes = Int(bits, symmetric=symmetric, narrow=narrow)
        self.supports_masking = True
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        """`x`, of any shape, rounded to the codes' values."""
        if self.away:
            signed = x / self.scale + float(self.zero_point - self._shift)
            rounded = ops.sign(signed) * ops.floor(ops.abs(signed) + (0.5 + TIE))
            x = x + ops.stop_gradient((rounded - float(self.zero_point - self._shift)) * self.scale - x)
        return fake_quantize(x, self.scale, float(self.zero_point), self.codes, xp=xp)

    @property
    def _shift(self) -> int:
        """What is taken from the codes to make them signed."""
        return 0 if self.codes.symmetric else 2 ** (self.codes.bits - 1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        codes = {"bits": self.codes.bits, "symmetric": self.codes.symmetric, "narrow": self.codes.narrow}
        return {**super().get_config(), "scale": self.scale, "zero_point": self.zero_point, "away": self.away, **codes}


@keras.saving.register_keras_serializable(package="whet")
class DynamicFakeQuantize(keras.layers.Layer):  # type: ignore[misc]
    """A tensor rounded to unsigned codes of its own range, as `whet.numerics.affine.dynamic_rounded` does."""

    def __init__(self, bits: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bits = int(bits)
        self.supports_masking = True
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        """`x`, of any shape."""
        return dynamic_rounded(x, self.bits, xp=xp)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "bits": self.bits}


def arrays(program: Program) -> tuple[dict[str, WeightView], dict[str, npt.NDArray[np.float32]]]:
    """The weights, as they are quantized, and biases of a program as NumPy arrays, batch norm folded."""
    weights = {name: quantized_view(kernel) for name, kernel in program.kernels.items()}
    return weights, {name: to_numpy(variable).astype(np.float32) for name, variable in program.biases.items()}


def quantized_view(kernel: Kernel) -> WeightView:
    """A kernel as it is quantized: a depthwise one, (…, in, multiplier), as (…, 1, in * multiplier)."""
    view = kernel.view()
    if view.in_axis is not None:
        return view
    array = np.reshape(view.array, (*view.array.shape[:-2], 1, -1))
    return WeightView(view.name, view.layer, array, array.ndim - 1, None)


def simulate(model: Model, plan: Plan) -> Model:
    """A copy of `model` that computes, in float, what the target's integers will.

    It is a flat Functional model: batch norm folded, weights and biases rounded, a `FakeQuantize` layer behind every value
    that the plan quantizes.

    Raises:
        ModelError: the plan was made for another model.
    """
    program = planned(model, plan)
    for name, array in rounded_weights(program, plan).items():
        program.kernels[name].variable.assign(array)
    for name, codes, scale in bias_codes(program, plan):
        program.biases[name].assign(codes.astype(np.float32) * scale)
    round_at_run_time(program, plan)
    return assemble(program, insert=inserter(program, plan))


def round_at_run_time(program: Program, plan: Plan, wrapped: Callable[[str, Any], Any] | None = None) -> None:
    """*In place*: a layer that rounds what it reads before every operation that the plan says so of.

    wrapped: what takes the place of the layer, by the operation's name.
    """
    calls: list[Call] = []
    for call in program.calls:
        spec = plan.dynamic.get(call.node.name)
        if spec is not None:
            (source,) = call.inputs
            layer: Any = DynamicFakeQuantize(spec.bits, name=f"round_{safe(call.node.name)}")
            layer = layer if wrapped is None else wrapped(call.node.name, layer)
            ref = replace(source, name=f"{call.node.name}/input")
            node = Node(ref.name, "dynamic", (source.name,), call.node.layer)
            calls.append(Call(node, layer, (source,), {}, ref))
            call = renamed(call, {source.name: ref})
        calls.append(call)
    program.calls = calls


def planned(model: Model, plan: Plan, example: Any = None) -> Program:
    """The program of `model`, which `plan` must fit."""
    program = lowered(model, _symbolic_example(model) if example is None else example)
    values = {ref.name for ref in program.values()}
    missing = [name for name in (*plan.weights, *plan.casts) if name not in program.kernels]
    missing += [name for name in plan.biases if name not in program.biases]
    variables = named_variables(program)
    missing += [name for name in plan.tensors if name not in variables]
    missing += [name for name in plan.values if name not in values]
    if missing:
        raise ModelError(
            f"This plan was made for another model: it quantizes {missing[0]!r}, which {model.name!r} does not have. "
            "Quantize this model itself."
        )
    for name, array in plan.tensors.items():
        variables[name].assign(array.reshape(variables[name].shape))
    return program


def _symbolic_example(model: Model) -> Any:
    """What a subclassed model was built with, in the place of an example; None where it does not say."""
    build = getattr(model, "_build_shapes_dict", None)
    shape = next(iter(build.values()), None) if build and len(build) == 1 else None
    if not isinstance(shape, tuple | list) or not shape or not all(size is None or isinstance(size, int) for size in shape):
        return None
    return np.zeros([size or 1 for size in shape], np.float32)


def rounded_weights(program: Program, plan: Plan, only: Collection[str] | None = None) -> dict[str, npt.NDArray[np.float32]]:
    """The planned weights (`only` these) as the file will hold them, in float."""
    found = {}
    for name in plan.weights if only is None else plan.weights.keys() & set(only):
        kernel = program.kernels[name]
        array = np.asarray(quantized_view(kernel).array, np.float32)
        found[name] = plan.rounded(name, array).reshape(kernel.variable.shape)
    for name, dtype in plan.casts.items():
        if only is not None and name not in only:
            continue
        array = to_numpy(program.kernels[name].variable)
        found[name] = to_numpy(ops.cast(ops.cast(ops.convert_to_tensor(array), dtype), "float32"))
    return found


def bias_codes(program: Program, plan: Plan) -> list[tuple[str, npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """(name, int32 codes, scale) of every planned bias."""
    found = []
    for name, (source, weight) in plan.biases.items():
        bias = to_numpy(program.biases[name]).astype(np.float32)
        scales = plan.values[source].scale, plan.weights[weight].scale
        found.append((name, quantize_bias(bias, *scales), np.asarray(scales[0] * scales[1], np.float32)))
    return found


def _alike(one: QParams | None, other: QParams | None) -> bool:
    return one is not None and other is not None and bool(one.scale == other.scale and one.zero_point == other.zero_point)


def inserter(program: Program, plan: Plan) -> Any:
    """What stands behind each value: its quantizer, or nothing where the codes cannot have changed."""
    moved = {"max_pool", "reshape", "flatten", "transpose", "identity", "concat", "pad"}
    same: Mapping[str, bool] = {
        call.node.name: call.node.op in moved
        and all(plan.values.get(value) is plan.values.get(call.node.name) for value in call.node.inputs)
        for call in program.calls
    }

    # Where an average has the scale of its input, the runtime takes the mean of the codes themselves.
    averages = {
        call.node.name
        for call in program.calls
        if call.node.op == "avg_pool" and _alike(plan.values.get(call.node.inputs[0]), plan.values.get(call.node.name))
    }

    kernels = Arithmetic(program, plan)

    def insert(ref: Ref, tensor: Tensor) -> Tensor:
        tensor = kernels.computed(ref, tensor)
        params = plan.values.get(ref.name)
        if params is None or same.get(ref.name, False):
            return kernels.seen(ref, tensor)
        spec = params.spec
        name = f"quantize_{safe(ref.name)}"
        scale, zero_point = float(params.scale), int(params.zero_point)
        away = ref.name in averages
        quantizer = FakeQuantize(scale, zero_point, spec.bits, spec.symmetric, spec.narrow, away, name=name)
        return kernels.seen(ref, quantizer(tensor))

    return insert
