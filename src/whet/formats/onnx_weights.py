"""Stored weights as ONNX operators, for the writers of both frameworks.

There are four forms. `decoded` gives the float weight by operators that read constants alone: ONNX Runtime folds them when it
loads the file, so that the file is small and the running model is as large and as fast as the float one. `product` is a
matrix product behind a DequantizeLinear, which ONNX Runtime runs as MatMulNBits, on codes, with the activations rounded to
8 bits inside, and OpenVINO likewise. `dynamic_product` rounds its input at run time. `lookup` reads rows of codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from whet.errors import ExportError, require
from whet.numerics.affine import QParams
from whet.numerics.codebook import Codebook
from whet.specs.schemes import Float, KMeans

Array = npt.NDArray[Any]
OPSET = 21  # has codes of 4 and 16 bits, and scales for blocks
FLOAT, INT8, UINT8, INT32 = 1, 3, 2, 6  # ONNX's numbers for types
LEAST_BLOCK = 16  # of ONNX Runtime's product of codes, whose blocks are powers of two


class Graph(Protocol):
    """A graph in the making."""

    def add(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        """Append a node of one output, whose name is returned."""

    def split(self, op: str, inputs: Sequence[str], hint: str, outputs: int, **attributes: Any) -> list[str]:
        """Append a node; the names of its outputs."""

    def constant(self, array: Any, hint: str) -> str:
        """The name of an initializer that holds `array`."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeight:
    """A weight as a plan stores it. codes: integers, in the layout that the axes of `params` speak of."""

    name: str
    codes: Array
    params: QParams | Codebook

    def turned(self, order: Sequence[int]) -> StoredWeight:
        """With the axes of the weight in another order."""
        old, rank = self.params, self.codes.ndim
        axis = None if old.axis is None else list(order).index(old.axis % rank)
        group = None if old.group is None else (list(order).index(old.group[0] % rank), old.group[1])

        def moved(array: Array) -> Array:  # groups alone have the weight's own axes
            return array if group is None else np.transpose(array, (*order, *range(rank, array.ndim)))

        new: QParams | Codebook
        if isinstance(old, QParams):
            new = QParams(moved(old.scale), moved(old.zero_point), old.spec, axis, group)
        else:
            levels = moved(old.levels) if old.levels.ndim > 1 else old.levels
            new = Codebook(levels, moved(old.scale), old.spec, axis, group)
        return StoredWeight(self.name, np.transpose(self.codes, order), new)


def typed(weight: StoredWeight) -> Array:
    """The codes in the type that the file holds them in: 4, 8 or 16 bits, unsigned with zero points and levels; float8."""
    types = require("ml_dtypes", "onnx", "Writing ONNX files")
    params = weight.params
    if isinstance(params, Codebook) and isinstance(params.spec, Float):
        values: Array = params.levels[weight.codes].astype(types.float8_e4m3fn)
        return values
    unsigned = isinstance(params, Codebook) or not params.spec.symmetric
    return _as_bits(weight.codes, 4 if params.bits <= 4 else 8 if params.bits <= 8 else 16, unsigned)


def _as_bits(codes: Array, bits: int, unsigned: bool) -> Array:
    if bits == 4:
        types = require("ml_dtypes", "onnx", "Writing ONNX files")
        half: Array = codes.astype(types.uint4 if unsigned else types.int4)
        return half
    whole: Array = codes.astype(f"{'u' if unsigned else ''}int{bits}")
    return whole


def decoded(graph: Graph, weight: StoredWeight) -> str:
    """The float weight, in the layout of its codes: `(codes - zero_point) * scale`, or `levels[codes] * scale`.

    Where groups divide their axis, the axis is split in two while codes become floats, which OpenVINO knows as groups.
    """
    name, params, shape = weight.name, weight.params, weight.codes.shape
    codes = graph.constant(typed(_split(weight)), name)
    if isinstance(params, QParams):
        value = graph.add("Cast", [codes], f"{name}_cast", to=FLOAT)
        if not params.spec.symmetric:
            points = _as_bits(params.zero_point, 8 if params.bits <= 8 else 16, True)
            zero = graph.add("Cast", [_spread(graph, weight, points, "zero_point")], f"{name}_zero", to=FLOAT)
            value = graph.add("Sub", [value, zero], f"{name}_steps")
    elif isinstance(params.spec, Float):
        value = graph.add("Cast", [codes], f"{name}_cast", to=FLOAT)
    else:
        index = graph.add("Cast", [codes], f"{name}_index", to=INT32)
        if params.levels.ndim > 1:
            index = graph.add("Add", [index, _spread(graph, weight, _table_starts(params), "tables")], f"{name}_place")
        value = graph.add("Gather", [graph.constant(params.levels.reshape(-1), f"{name}_levels"), index], f"{name}_level")
    if not isinstance(params.spec, KMeans):  # its levels are the weights themselves
        value = graph.add("Mul", [value, _spread(graph, weight, params.scale, "scale")], f"{name}_float")
    if params.group is None or not _is_even(weight):
        return value
    return graph.add("Reshape", [value, graph.constant(np.asarray(shape, np.int64), "shape")], f"{name}_whole")


def check_even(weights: Iterable[StoredWeight]) -> None:
    """Refuse groups that do not divide their axis, which OpenVINO computes wrong or not at all (seen in 2026.4).

    Raises:
        ExportError: naming the weight and its sizes.
    """
    for weight in weights:
        if weight.params.group is not None and not _is_even(weight):
            along, size = weight.params.group
            raise ExportError(
                f"The weight {weight.name!r} has {weight.codes.shape[along]} input features in groups of {size}, and OpenVINO "
                f"takes only groups that divide them. Choose a size that does, or the target onnxruntime."
            )


def _is_even(weight: StoredWeight) -> bool:
    """Whether the groups divide their axis."""
    return weight.params.group is not None and weight.codes.shape[weight.params.group[0]] % weight.params.group[1] == 0


def _split(weight: StoredWeight) -> StoredWeight:
    """With the axis of even groups split into groups and their features."""
    if weight.params.group is None or not _is_even(weight):
        return weight
    along, size = weight.params.group
    shape = weight.codes.shape
    return replace(weight, codes=weight.codes.reshape(*shape[:along], -1, size, *shape[along + 1 :]))


def _table_starts(params: Codebook) -> Array:
    """Where the table of each scale begins in the flat array of all tables."""
    starts: Array = np.arange(params.scale.size, dtype=np.int32).reshape(params.scale.shape) * params.levels.shape[-1]
    return starts


def _spread(graph: Graph, weight: StoredWeight, array: Array, label: str) -> str:
    """Scales (zero points, …) in a shape that broadcasts against the weight's codes; see `affine.spread`."""
    params, shape, hint = weight.params, weight.codes.shape, f"{weight.name}_{label}"
    if params.group is None:
        if params.axis is not None:
            array = array.reshape([-1 if index == params.axis % len(shape) else 1 for index in range(len(shape))])
        return graph.constant(array, hint)
    along, size = params.group
    if _is_even(weight):
        return graph.constant(np.expand_dims(array, along + 1), hint)
    index = graph.constant(np.arange(shape[along], dtype=np.int64) // size, f"{weight.name}_groups")
    return graph.add("Gather", [graph.constant(array, hint), index], f"{hint}_spread", axis=along)


def product(graph: Graph, x: str, weight: StoredWeight, bias: str | None, hint: str) -> str:
    """`x @ w + bias` for a weight (in, out): on codes where ONNX Runtime has a kernel, else on the float weight."""
    stored = _block_dequantized(graph, weight) if _has_kernel(weight) else decoded(graph, weight)
    made = graph.add("MatMul", [x, stored], hint)
    return made if bias is None else graph.add("Add", [made, bias], f"{hint}_sum")


def _has_kernel(weight: StoredWeight) -> bool:
    """Whether ONNX Runtime multiplies these codes: up to 8 bits, in blocks of a power of two, or with a scale per column."""
    params = weight.params
    if not isinstance(params, QParams) or params.bits > 8 or weight.codes.ndim != 2 or params.axis == 0:
        return False
    if params.group is None:
        return True
    along, size = params.group
    return along == 0 and (params.scale.shape[0] == 1 or (size >= LEAST_BLOCK and size & (size - 1) == 0))


def _block_dequantized(graph: Graph, weight: StoredWeight) -> str:
    """A DequantizeLinear with a scale for each column, or for each block of rows in it."""
    params, name = weight.params, weight.name
    if not isinstance(params, QParams):
        raise TypeError(f"{name} has levels, and DequantizeLinear takes scales alone")
    columns = weight.codes.shape[1]
    attributes = {"axis": 1}
    scale: Array = params.scale
    zero: Array = params.zero_point
    if params.group is None or scale.shape[0] == 1:
        scale, zero = np.broadcast_to(scale.reshape(-1), (columns,)), np.broadcast_to(zero.reshape(-1), (columns,))
    else:
        attributes = {"axis": 0, "block_size": params.group[1]}
    inputs = [graph.constant(typed(weight), name), graph.constant(scale, f"{name}_scale")]
    if not params.spec.symmetric:
        points = _as_bits(zero, 4 if params.bits <= 4 else 8, True)
        inputs.append(graph.constant(points, f"{name}_zero_point"))
    return graph.add("DequantizeLinear", inputs, f"{name}_float", **attributes)


def dynamic_product(graph: Graph, x: str, weight: StoredWeight, bias: str | None, hint: str) -> str:
    """`x @ w + bias` in integers, `x` rounded to 8 bits of its own range; ONNX Runtime runs it as DynamicQuantizeMatMul."""
    params = weight.params
    codes, scale, zero = graph.split("DynamicQuantizeLinear", [x], f"{hint}_input", 3)
    whole = graph.add("MatMulInteger", [codes, graph.constant(weight.codes.astype(np.int8), weight.name), zero], f"{hint}_int")
    factor = graph.add("Mul", [scale, graph.constant(params.scale, f"{weight.name}_scale")], f"{hint}_factor")
    made = graph.add("Mul", [graph.add("Cast", [whole], f"{hint}_cast", to=FLOAT), factor], hint)
    return made if bias is None else graph.add("Add", [made, bias], f"{hint}_sum")


def lookup(graph: Graph, ids: str, weight: StoredWeight, hint: str) -> str:
    """Rows `ids` of a weight (rows, features): codes are gathered, and only these rows become floats."""
    name, params = weight.name, weight.params
    if isinstance(params.spec, Float) or (params.axis is not None and params.axis != 0):
        return graph.add("Gather", [decoded(graph, weight), ids], hint, axis=0)
    codes = graph.constant(typed(weight), name)
    unsigned = isinstance(params, Codebook) or not params.spec.symmetric
    if params.bits <= 4:  # no runtime gathers half bytes
        codes = graph.add("Cast", [codes], f"{name}_bytes", to=UINT8 if unsigned else INT8)
    rows = graph.add("Gather", [codes, ids], f"{hint}_codes", axis=0)
    features = weight.codes.shape[1]

    def of_rows(array: Array, label: str) -> str:
        """What belongs to the rows that are read, for each of their features."""
        if params.axis is None:
            return graph.constant(array, f"{name}_{label}")
        found = graph.add("Gather", [graph.constant(array.reshape(array.shape[0], -1), f"{name}_{label}"), ids], label, axis=0)
        if params.group is None:
            return found
        index = graph.constant(np.arange(features, dtype=np.int64) // params.group[1], f"{name}_groups")
        return graph.add("Gather", [found, index], f"{hint}_{label}", axis=-1)

    if isinstance(params, QParams):
        value = graph.add("Cast", [rows], f"{hint}_cast", to=FLOAT)
        if not params.spec.symmetric:
            points = _as_bits(params.zero_point, 8 if params.bits <= 8 else 16, True)
            zero = graph.add("Cast", [of_rows(points, "zero_point")], f"{hint}_zero", to=FLOAT)
            value = graph.add("Sub", [value, zero], f"{hint}_steps")
    else:
        index = graph.add("Cast", [rows], f"{hint}_index", to=INT32)
        if params.levels.ndim > 1:
            index = graph.add("Add", [index, of_rows(_table_starts(params), "tables")], f"{hint}_place")
        value = graph.add("Gather", [graph.constant(params.levels.reshape(-1), f"{name}_levels"), index], f"{hint}_level")
    return value if isinstance(params.spec, KMeans) else graph.add("Mul", [value, of_rows(params.scale, "scale")], hint)
