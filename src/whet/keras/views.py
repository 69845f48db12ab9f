"""The kernels of a Keras model, under names that stay unique.

A layer's path is the names of the models and layers around it, joined by `/`, without the outermost model:
`encoder/conv2d`. Where two layers have one path, the later ones get `_2`, `_3`, …; copies of a model have equal paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from whet.graph.views import WeightView

Layer = Any
Variable = Any

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_CELLS = (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """One kernel variable and where its channels are.

    name: `layer path/kernel`. out_axis, in_axis: as in `WeightView`. A depthwise kernel (h, w, in, multiplier) has its
    output channels on `in` (one for each input channel and multiplier, the multiplier running fastest) and no in_axis.
    """

    name: str
    layer: str
    variable: Variable
    out_axis: int
    in_axis: int | None

    def view(self) -> WeightView:
        """A copy of its present values as a NumPy array."""
        return WeightView(self.name, self.layer, np.array(to_numpy(self.variable)), self.out_axis, self.in_axis)


def to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """A variable or tensor of any backend as a NumPy array; bfloat16 becomes float32."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def assign_copy(goal: Any, source: Any) -> None:
    """*In place*: the variable `goal` gets the values of `source`.

    On JAX `assign` alone would let both share a buffer, which a training step of one takes away from the other.
    """
    goal.assign(np.array(to_numpy(source)))


def walk(model: Layer) -> Iterator[tuple[str, Layer]]:
    """Every layer below `model` once, with its path, outer before inner, in the order in which models list them."""
    taken: set[str] = set()
    seen: set[int] = {id(model)}

    def visit(layer: Layer, prefix: str) -> Iterator[tuple[str, Layer]]:
        for child in sublayers(layer):
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = unique(f"{prefix}{child.name}", taken)
            yield path, child
            yield from visit(child, f"{path}/")

    yield from visit(model, "")


def sublayers(layer: Layer) -> list[Layer]:
    """The layers directly inside a model or layer, without input layers. Keras has no public name for those of layers."""
    inside = layer.layers if isinstance(layer, keras.Model) else layer._layers
    return [child for child in inside if not isinstance(child, keras.layers.InputLayer)]


def unique(name: str, taken: set[str]) -> str:
    """`name`, or `name_2`, `name_3`, … where it is taken; the result is then taken too."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def kernels(model: Layer) -> list[Kernel]:
    """The kernels of convolution, dense and einsum layers, a shared one once. Biases, norms and embeddings are not kernels."""
    found: list[Kernel] = []
    seen: set[int] = set()
    for path, layer in walk(model):
        for attribute, out_axis, in_axis in _axes(layer):
            variable = getattr(layer, attribute)
            if id(variable) not in seen:
                seen.add(id(variable))
                found.append(Kernel(f"{path}/{attribute}", path, variable, out_axis, in_axis))
    return found


def further_weights(model: Layer) -> list[Kernel]:
    """The weights that are quantized alone and never pruned: embeddings (rows, features), and those of recurrent cells."""
    found: list[Kernel] = []
    for path, layer in walk(model):
        if not layer.built or getattr(layer, "lora_enabled", False):
            continue
        if isinstance(layer, keras.layers.Embedding):
            found.append(Kernel(f"{path}/embeddings", path, layer.embeddings, 0, 1))
        elif isinstance(layer, _CELLS):
            found += [Kernel(f"{path}/{name}", path, getattr(layer, name), 1, 0) for name in ("kernel", "recurrent_kernel")]
    return found


def views(model: Layer) -> dict[str, WeightView]:
    """The kernels of `model` by name, as NumPy arrays in Keras' layout (…, in, out)."""
    return {kernel.name: kernel.view() for kernel in kernels(model)}


def unpruned(model: Layer) -> list[tuple[str, str]]:
    """(layer path, reason) of the layers whose weights of two or more axes are not kernels."""
    listed = []
    for path, layer in walk(model):
        if not _axes(layer) and any(len(variable.shape) >= 2 for variable in own_weights(layer)):
            lora = getattr(layer, "lora_enabled", False)
            listed.append((path, "LoRA is enabled" if lora else f"{type(layer).__name__} weights are not pruned"))
    return listed


def own_weights(layer: Layer) -> list[Variable]:
    """The weights that a layer holds itself, not through the layers inside it."""
    inside = {id(variable) for child in layer._layers for variable in child.weights}
    return [variable for variable in layer.weights if id(variable) not in inside]


def _axes(layer: Layer) -> list[tuple[str, int, int | None]]:
    """(attribute, out_axis, in_axis) of each kernel of `layer`."""
    if not layer.built or getattr(layer, "lora_enabled", False):
        return []
    if isinstance(layer, _SEPARABLE):
        rank = len(layer.pointwise_kernel.shape)
        return [("depthwise_kernel", rank - 2, None), ("pointwise_kernel", rank - 1, rank - 2)]
    if isinstance(layer, keras.layers.EinsumDense):
        return [("kernel", *_einsum_axes(layer))]
    if isinstance(layer, (*_DEPTHWISE, *_TRANSPOSED, *_CONVOLUTIONS, keras.layers.Dense)):
        rank = len(layer.kernel.shape)
        if isinstance(layer, _DEPTHWISE):
            return [("kernel", rank - 2, None)]
        if isinstance(layer, _TRANSPOSED):  # a Keras transposed kernel is (…, out, in)
            return [("kernel", rank - 2, rank - 1)]
        return [("kernel", rank - 1, rank - 2)]
    return []


def _einsum_axes(layer: Layer) -> tuple[int, int | None]:
    """The last kernel axis that the output keeps, and the first one that is summed over (`abc,cde->abde`: 2 and 0)."""
    operands, output = layer.equation.replace(" ", "").replace("...", "").split("->")
    letters = operands.split(",")[1]
    kept = [i for i, letter in enumerate(letters) if letter in output]
    summed = [i for i, letter in enumerate(letters) if letter not in output]
    return (kept[-1] if kept else len(letters) - 1), (summed[0] if summed else None)
