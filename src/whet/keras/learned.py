"""Quantizers that train: rounding with straight-through gradients, scales that are learned (LSQ) or observed.

`y = s · clip(round(x / s), low, high)` has the gradients of Esser et al. 2020 (arXiv:1902.08153, eq. 3 and 5):

    ∂y/∂x = 1 inside the range, else 0;     ∂y/∂s = round(x/s) − x/s inside the range, else low or high,

and the gradient of `s` is multiplied by `1 / √(N · high)`, N being the values of one example that share the scale (§2.2).

A trained scale is `base · factor`: `base` is what it began with and `factor`, which trains, begins at 1. Its gradient is such
that a step of SGD moves the scale exactly as it would move a scale that is trained itself; Adam, whose steps have the size of
the learning rate whatever the gradient, moves it by a fraction of itself instead of by a fixed amount.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from whet.errors import ModelError
from whet.keras.namespace import xp
from whet.numerics.affine import qparams
from whet.specs.schemes import Int

Tensor = Any
Layer = Any

STATE = frozenset({"kernel_base", "kernel_factor", "kernel_zero", "kernel_mask"})  # variables of a layer's quantizer
TINY = 2.0**-40  # a scale below it belongs to a channel of zeros, and is not trained
LEAST_FACTOR = 2.0**-6  # a trained scale stays above this part of where it began


def round_through(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """`scale · clip(round(x / scale), low, high)` with LSQ's gradients; `scale` broadcasts against `x`.

    low, high: the codes' range less the zero point.
    """
    inside = ops.clip(x / scale, low, high)
    return (inside + ops.stop_gradient(ops.round(inside) - inside)) * scale


def fused_round_through(x: Tensor, scale: Tensor, low: float, high: float, bits: int, narrow: bool) -> Tensor:
    """`round_through` by TensorFlow's own operator, in one pass forward and one back. `scale` is one number.

    It takes halves up where we round them to even; nothing else differs.
    """
    import tensorflow as tf

    options = {"num_bits": bits, "narrow_range": narrow}

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(x: Tensor, scale: Tensor) -> Any:
        ends = low * scale, high * scale
        y = tf.quantization.fake_quant_with_min_max_vars(x, *ends, **options)

        def gradient(upstream: Tensor) -> Any:
            inner, below, above = tf.quantization.fake_quant_with_min_max_vars_gradient(upstream, x, *ends, **options)
            moved = tf.reduce_sum(inner * (y - x)) / scale
            return inner, moved + low * below + high * above

        return y, gradient

    return run(x, scale)


def learning_rate_scale(base: Tensor, count: int, high: float) -> Tensor:
    """What the gradient of `base · factor` by `factor` is multiplied by: `g / base²`, `g = 1 / √(count · high)`."""
    real = base > TINY
    safe = ops.where(real, base, ops.ones_like(base))
    return ops.where(real, 1.0 / (math.sqrt(count * max(high, 1.0)) * safe * safe), ops.zeros_like(base))


def learned_scale(base: Tensor, factor: Tensor, count: int, high: float) -> Tensor:
    """`base · factor`, with the gradient that `learning_rate_scale` says."""
    factor = ops.maximum(factor, LEAST_FACTOR)
    rate = ops.stop_gradient(learning_rate_scale(base, count, high))
    held = ops.stop_gradient(factor)
    return base * (held + rate * (factor - held))


@keras.saving.register_keras_serializable(package="whet")
class LearnedQuantize(keras.layers.Layer):  # type: ignore[misc]
    """The quantizer of one value, or of several that share a scale, while the model trains.

    It begins at `scale` and `zero_point`. learn: the scale trains. observe: for so many training steps the range is the
    moving average of each batch's least and greatest value (Jacob et al. 2018, §3.1); then it is frozen. members: how many
    values share it; the range holds all of theirs. bits, symmetric and narrow are those of `Int`.
    """

    def __init__(
        self,
        scale: float,
        zero_point: int,
        bits: int = 8,
        symmetric: bool = False,
        narrow: bool | None = None,
        *,
        learn: bool = False,
        observe: int = 0,
        members: int = 1,
        momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.codes = Int(bits, symmetric=symmetric, narrow=narrow)
        self.learn, self.observe, self.members, self.momentum = bool(learn), int(observe), int(members), float(momentum)
        self.supports_masking = True
        self.factor: Any = None
        self.low: Any = None
        self.high: Any = None
        self.seen: Any = None
        self._add_state()
        self.built = True

    def _add_state(self) -> None:
        if self.learn:
            self.factor = self.add_weight(name="factor", shape=(), initializer="ones", dtype="float32")
        if self.observe:
            shape = (self.members,)
            first = [(code - self.zero_point) * self.scale for code in (self.codes.qmin, self.codes.qmax)]
            self.low, self.high = (
                self._state(name, shape, keras.initializers.Constant(value))
                for name, value in zip(("low", "high"), first, strict=True)
            )
            self.seen = self._state("seen", shape, "zeros")

    def _state(self, name: str, shape: tuple[int, ...], initializer: Any) -> Any:
        return self.add_weight(
            name=name, shape=shape, initializer=initializer, dtype="float32", trainable=False, aggregation="mean"
        )

    def call(self, x: Tensor, member: int = 0, training: bool | None = None) -> Tensor:
        """`x`, of any shape, rounded; `member` is which of the values it is."""
        dtype = keras.backend.standardize_dtype(x.dtype)
        wide = ops.cast(x, "float32")
        factor = self._factor()
        if self.observe and training and member >= 0:
            self._watch(ops.stop_gradient(wide), member)
        scale, zero_point = self._present(factor, int(np.prod([size or 1 for size in x.shape[1:]])))
        if isinstance(zero_point, float):
            low, high = self.codes.qmin - zero_point, self.codes.qmax - zero_point
            if keras.backend.backend() == "tensorflow":
                narrow = self.codes.symmetric and self.codes.qmin == -self.codes.qmax
                return ops.cast(fused_round_through(wide, scale, low, high, self.codes.bits, narrow), dtype)
            return ops.cast(round_through(wide, scale, low, high), dtype)
        return ops.cast(round_through(wide, scale, self.codes.qmin - zero_point, self.codes.qmax - zero_point), dtype)

    def _factor(self) -> Tensor | None:
        """What training made of the scale; constant while the range is still observed, None where scales do not train."""
        if self.factor is None or self.seen is None:
            return None if self.factor is None else self.factor.value
        factor = self.factor.value
        return ops.where(ops.min(self.seen.value) < self.observe, ops.stop_gradient(factor), factor)

    def _present(self, factor: Tensor | None, count: int) -> tuple[Tensor, Any]:
        base: Any = ops.convert_to_tensor(self.scale, dtype="float32")
        zero_point: Any = float(self.zero_point)
        if self.observe:
            base, zero_point = qparams(ops.min(self.low.value), ops.max(self.high.value), self.codes, xp=xp)
            base, zero_point = ops.stop_gradient(base), ops.stop_gradient(zero_point)
        if factor is None:
            return base, zero_point
        return learned_scale(base, factor, count, self.codes.qmax - self.zero_point), zero_point

    def _watch(self, x: Tensor, member: int) -> None:
        """Let the averages of `member` follow this batch, unless they are frozen."""
        own = ops.one_hot(member, self.members, dtype="float32")
        watching = self.seen.value[member] < self.observe
        old = ops.stack([self.low.value, self.high.value])

        def follow() -> Tensor:
            now = ops.stack([ops.min(x), ops.max(x)])
            return old + ops.expand_dims((now - old[:, member]) * (1.0 - self.momentum), 1) * own

        new = ops.cond(watching, follow, lambda: old)
        self.low.assign(new[0])
        self.high.assign(new[1])
        self.seen.assign(self.seen.value + own)

    def present(self) -> tuple[Tensor, Any]:
        """Scale and zero point as they now are; the zero point is a plain number unless it may still move."""
        return self._present(self._factor(), 1)

    def solved(self) -> tuple[float, int]:
        """Scale and zero point as numbers, for a plan."""
        scale, zero_point = self.present()
        zero = zero_point if isinstance(zero_point, float) else ops.convert_to_numpy(zero_point)
        return float(ops.convert_to_numpy(scale)), int(zero)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        codes = {"bits": self.codes.bits, "symmetric": self.codes.symmetric, "narrow": self.codes.narrow}
        own = {"learn": self.learn, "observe": self.observe, "members": self.members, "momentum": self.momentum}
        return {**super().get_config(), "scale": self.scale, "zero_point": self.zero_point, **codes, **own}


class KernelQuantizer:
    """Mixed into a layer's class: wherever the layer reads its kernel, it gets the kernel masked and rounded.

    Its state besides the kernel: `kernel_base` (the scales it began with, in a shape that broadcasts), `kernel_factor` (what
    training made of them, if they are learned), `kernel_zero` (zero points, if codes are asymmetric), and `kernel_mask` (1
    where kept, if weights were pruned). `quantizer["bits"]` is None where weights are masked and not rounded.
    """

    quantizer: dict[str, Any]

    def __init__(self, *args: Any, quantizer: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if quantizer is None:
            raise ModelError(f"{type(self).__name__} is made by whet.keras.prepare, or read from a file that was saved of it.")
        self.quantizer = dict(quantizer)

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        """Make the layer's own variables, then the quantizer's."""
        super().build(*args, **kwargs)  # type: ignore[misc]
        add_quantizer_state(self)

    @property
    def kernel(self: Any) -> Tensor:
        """The kernel as its codes will have it."""
        return quantized_kernel(self)

    @kernel.setter
    def kernel(self: Any, value: Any) -> None:
        """What Keras' own `build` assigns."""
        self._kernel = value

    @property
    def bias(self: Any) -> Tensor:
        """The bias as integers at `input scale × weight scale` will have it, where the input's quantizer is known."""
        return quantized_bias(self)

    @bias.setter
    def bias(self: Any, value: Any) -> None:
        """What Keras' own `build` assigns."""
        self._bias = value

    def save_own_variables(self: Any, store: Any) -> None:
        """All variables by their position: a layer that lists its own would forget the quantizer's."""
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self: Any, store: Any) -> None:
        """The inverse of `save_own_variables`."""
        keras.layers.Layer.load_own_variables(self, store)

    def get_config(self: Any) -> dict[str, Any]:
        """The layer's own configuration, and the quantizer's."""
        return {**super().get_config(), "quantizer": dict(self.quantizer)}  # type: ignore[misc]


def add_quantizer_state(layer: Layer) -> None:
    """Make the variables of the quantizer of a layer that is built."""
    options = layer.quantizer
    layer._tracker.unlock()
    frozen = {"dtype": "float32", "trainable": False, "autocast": False}
    shape = tuple(options["shape"])
    if options["bits"] is not None:
        layer.kernel_base = layer.add_weight(name="kernel_base", shape=shape, initializer="ones", **frozen)
    if options["learn"]:
        layer.kernel_factor = layer.add_weight(
            name="kernel_factor", shape=shape, initializer="ones", dtype="float32", autocast=False
        )
    if not options["symmetric"]:
        layer.kernel_zero = layer.add_weight(name="kernel_zero", shape=shape, initializer="zeros", **frozen)
    if options["masked"]:
        layer.kernel_mask = layer.add_weight(
            name="kernel_mask", shape=tuple(layer._kernel.shape), initializer="ones", **{**frozen, "dtype": "int8"}
        )
    layer._tracker.lock()
    layer.has_quantizer = True


def quantized_kernel(layer: Layer) -> Tensor:
    """The kernel of a layer, masked, and rounded with LSQ's gradients."""
    options, weight = layer.quantizer, layer._kernel.value
    if not getattr(layer, "has_quantizer", False):  # the layer is being built
        return weight
    if options["masked"]:
        weight = ops.where(ops.cast(layer.kernel_mask, "bool"), weight, ops.zeros_like(weight))
    if options["bits"] is None:
        return weight
    codes = _codes(options)
    low, high = float(codes.qmin), float(codes.qmax)
    scale = _spread(layer, kernel_scale(layer))
    if codes.symmetric:
        return round_through(weight, scale, low, high)
    zero = _spread(layer, layer.kernel_zero.value)
    return round_through(weight, scale, low - zero, high - zero)


@dataclass(frozen=True, slots=True, eq=False)
class BiasSource:
    """The quantizer of a layer's input, held so that Keras does not take it for a part of the layer.

    It is not saved with the layer: in a model read from a file biases are not rounded.
    """

    quantizer: LearnedQuantize


def quantized_bias(layer: Layer) -> Any:
    """The bias of a layer, rounded with straight-through gradients."""
    source = getattr(layer, "bias_source", None)
    if layer._bias is None or source is None:
        return layer._bias
    bias, (entry, _) = layer._bias.value, source.quantizer.present()
    step = ops.stop_gradient(entry * ops.reshape(kernel_scale(layer), (-1,)))
    return bias + ops.stop_gradient(ops.round(bias / step) * step - bias)


def kernel_scale(layer: Layer) -> Tensor:
    """The scales of a layer's kernel as they now are, in the shape of `kernel_base`."""
    options, base = layer.quantizer, layer.kernel_base.value
    if not options["learn"]:
        return base
    codes = _codes(options)
    count = max(1, int(np.prod(layer._kernel.shape)) // max(1, int(np.prod(options["shape"]))))
    return learned_scale(base, layer.kernel_factor.value, count, float(codes.qmax))


def _codes(options: Any) -> Int:
    return Int(options["bits"], symmetric=options["symmetric"], narrow=options["narrow"])


def _spread(layer: Layer, scale: Tensor) -> Tensor:
    """Scales of groups repeated along their axis."""
    if layer.quantizer["group"] is None:
        return scale
    axis, size = layer.quantizer["group"]
    repeated = ops.repeat(scale, size, axis=axis)
    return ops.take(repeated, np.arange(int(layer._kernel.shape[axis])), axis=axis)


_made: dict[type, type] = {}


def quantized_class(base: type) -> type:
    """The class `base` with a quantized kernel; those of Keras' own layers can be saved and loaded."""
    if base not in _made:
        _made[base] = type(f"Quantized{base.__name__}", (KernelQuantizer, base), {"__module__": base.__module__})
    return _made[base]


L = keras.layers
TRAINED = (
    *(L.Conv1D, L.Conv2D, L.Conv3D, L.DepthwiseConv1D, L.DepthwiseConv2D),
    *(L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose, L.Dense, L.EinsumDense),
)
for _base in TRAINED:
    keras.saving.register_keras_serializable(package="whet")(quantized_class(_base))
