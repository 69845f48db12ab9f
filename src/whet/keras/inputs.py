"""The inputs that the kernels of a Keras model multiply, seen on data."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from whet.data import Batches
from whet.graph.inputs import ROWS, InputSums, sums_of
from whet.graph.matrices import Layout, layout
from whet.keras.model import arrange
from whet.keras.moments import without_gradients
from whet.keras.patches import Geometry, columns_at, geometry, positions
from whet.keras.views import Kernel, kernels, to_numpy, walk

_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)


class InputReader:
    """Runs a model on the first `batches` of some data and sums up what its kernels read. The model is as before, after."""

    def __init__(self, model: Any, data: Batches, batches: int) -> None:
        """Raises DataError if the data holds no batch."""
        self._model = model
        self._layers = dict(walk(model))
        self._kernels = {kernel.name: kernel for kernel in kernels(model)}
        self._batches = [inputs for inputs, _ in data.some(batches, 0)]

    def sums(self, names: Collection[str], with_products: bool) -> dict[str, InputSums]:
        """By kernel name what it reads; kernels of layers that are no convolution or dense layer are missing."""
        rows = math.ceil(ROWS / len(self._batches))
        found: dict[str, InputSums] = {}
        wanted = [self._kernels[name] for name in names if _is_seen(self._layers[self._kernels[name].layer])]

        def note(kernel: Kernel, x: Any, output: Any) -> None:
            seed = zlib.crc32(f"{kernel.name}/{found[kernel.name].count if kernel.name in found else 0}".encode())
            more = _sums(kernel, self._layers[kernel.layer], to_numpy(x), to_numpy(output), rows, seed, with_products)
            found[kernel.name] = found[kernel.name].add(more) if kernel.name in found else more

        with _watched([(kernel, self._layers[kernel.layer]) for kernel in wanted], note), without_gradients():
            for inputs in self._batches:  # not compiled, so that every call is seen
                given = keras.tree.map_structure(keras.ops.convert_to_tensor, arrange(self._model, inputs))
                self._model(given, training=False)
        return found

    def assign(self, name: str, value: npt.NDArray[Any]) -> None:
        """*In place*: another value of a kernel."""
        self._kernels[name].variable.assign(value)


def _is_seen(layer: Any) -> bool:
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return False
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_width(layer) is not None
    return isinstance(layer, (*_TRANSPOSED, *_CONVOLUTIONS, keras.layers.Dense))


@contextmanager
def _watched(layers: list[tuple[Kernel, Any]], note: Any) -> Iterator[None]:
    """While the block runs, `note(kernel, input, output)` is called at every call of these layers."""

    def seen(kernel: Kernel, call: Any) -> Any:
        def run(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(inputs, *args, **kwargs)
            note(kernel, inputs, output)
            return output

        return run

    try:
        for kernel, layer in layers:
            layer.call = seen(kernel, layer.call)
        yield
    finally:
        for _, layer in layers:
            vars(layer).pop("call", None)


def _sums(kernel: Kernel, layer: Any, x: Any, output: Any, rows: int, seed: int, with_products: bool) -> InputSums:
    """The sums over a sample of the rows of one call."""
    x, shape = x.astype(np.float32), tuple(int(n) for n in kernel.variable.shape)
    if isinstance(layer, keras.layers.EinsumDense):
        width = _einsum_width(layer) or 1
        where = Geometry(0)
        x = x.reshape(-1, width)
        at = positions(where, x, rows, seed)
        return sums_of(columns_at(where, x, (), at), shape, Layout((width, math.prod(shape) // width), 1, 0), with_products)
    op = "linear" if isinstance(layer, keras.layers.Dense) else "conv_transpose" if isinstance(layer, _TRANSPOSED) else "conv"
    where = geometry(layer, op)
    at = positions(where, output, rows, seed)
    view = kernel.view()
    place = layout(view, op, where.groups)
    if kernel.in_axis is None:  # a depthwise kernel (…, in, multiplier) makes in × multiplier outputs
        flat = (*shape[:-2], 1, shape[-2] * shape[-1])
        place = Layout(flat, len(flat) - 1, None, where.groups)
    return sums_of(columns_at(where, x, output.shape[1:-1], at), shape, place, with_products)


def _einsum_width(layer: Any) -> int | None:
    """How many inputs an einsum sums over, where its kernel is (summed…, kept…) on the last axes of its input; else None."""
    operands, output = layer.equation.replace(" ", "").replace("...", "").split("->")
    given, own = operands.split(",")
    summed = [letter for letter in own if letter not in output]
    if not summed or own[: len(summed)] != "".join(summed) or not given.endswith("".join(summed)):
        return None
    return math.prod(int(n) for n in layer.kernel.shape[: len(summed)])
