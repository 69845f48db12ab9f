"""A plan's codes for a .tflite file: which plans it can hold, and which weight a constant in it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from whet.errors import ExportError
from whet.formats.tflite import Array, File
from whet.formats.tflite_integers import Find, Integers, Stored
from whet.graph.placement import Plan
from whet.numerics.affine import QParams

Order = tuple[int | None, ...]  # the axes of a kernel in the order of the file; None is a new axis


def check_plan(plan: Plan | None) -> None:
    """Raise `ExportError` for what LiteRT files cannot hold."""
    if plan is None:
        return
    for name, params in plan.weights.items():
        if not isinstance(params, QParams) or params.group is not None or not params.spec.symmetric:
            raise ExportError(
                f"LiteRT's integer kernels read symmetric weights per tensor or per channel, and {name!r} is quantized in "
                "another way. It can be simulated; to export, quantize with weights=Int(8) or fewer bits."
            )
        if params.spec.bits > 8:
            raise ExportError(
                f"LiteRT stores weights in at most 8 bits, and {name!r} has {params.spec.bits}. "
                "Quantize with weights=Int(8) or fewer bits."
            )
    odd = next((name for name, params in plan.values.items() if params.spec.bits != 8), None)
    if odd is not None:
        raise ExportError(
            f"LiteRT's integer kernels compute on 8-bit activations, and {odd!r} has {plan.values[odd].spec.bits} bits. "
            "Quantize with activations=Int(8, symmetric=False, granularity=PerTensor())."
        )
    cast = next((dtype for dtype in plan.casts.values() if dtype != "float16"), None)
    if cast is not None:
        raise ExportError(f"LiteRT files hold weights of float16, not of {cast}. Quantize with weights=Float('float16').")


def put_integers(file: File, plan: Plan, where: Mapping[str, int], find: Find) -> None:
    """Let `file` store and compute what `plan` says. where: value name -> the tensor that holds it.

    Raises:
        ExportError: a planned value has no tensor of its own, or a planned weight is not in the file.
    """
    values: dict[int, QParams] = {}
    for name, params in plan.values.items():
        index = where[name]
        if index in values and (values[index].scale != params.scale or values[index].zero_point != params.zero_point):
            raise ExportError(f"The converter put {name!r} and another value with another scale into one tensor.")
        values[index] = params
    integers = Integers(file, values, find)
    integers.apply()
    missing = sorted({*plan.weights, *plan.casts} - integers.stored)
    if missing:
        raise ExportError(
            f"The weight {missing[0]!r} was not found in what the converter made, so its codes could not be stored. "
            "Keep that layer float with keep=, and please report the model."
        )


def finder(weights: Iterable[tuple[str, Array, Mapping[str, Order]]], plan: Plan) -> Find:
    """Weights by their exact content, in the layouts of the operators that may read them.

    weights: (name, float values as they are quantized, operator -> order of the axes there).

    Raises:
        ExportError: two weights have one content and are quantized differently.
    """
    found: dict[tuple[str, tuple[int, ...], bytes], Stored | None] = {}
    for name, array, layouts in weights:
        for operator, order in layouts.items():
            stored = _stored(plan, name, array, operator, order)
            placed = arranged(array, order)
            key = (operator, tuple(placed.shape), placed.tobytes())
            if key in found and not _alike(found[key], stored):
                raise ExportError(f"Two layers have the same weights as {name!r} and are quantized differently.")
            found.setdefault(key, stored)

    def find(operator: str, array: Array) -> Stored | None:
        return found.get((operator, tuple(array.shape), array.tobytes()))

    return find


def _stored(plan: Plan, name: str, array: Array, operator: str, order: Order) -> Stored | None:
    """What the file holds in the place of a weight; None for one that stays float."""
    if name in plan.casts:
        return Stored(name, arranged(array, order).astype(np.float16))
    if name not in plan.weights:
        return None
    params = plan.weights[name]
    scale = params.scale if params.axis is None else params.scale.reshape(-1)
    axis = 3 if operator == "DEPTHWISE_CONV_2D" else 0
    return Stored(name, arranged(plan.encode(name, array).astype(np.int8), order), scale, axis)


def _alike(left: Stored | None, right: Stored | None) -> bool:
    if left is None or right is None or left.scale is None or right.scale is None:
        return (left is None) == (right is None)
    return np.array_equal(left.scale, right.scale) and np.array_equal(left.array, right.array)


def arranged(array: Array, order: Order) -> Array:
    """`array` with its axes in the order of the file."""
    turned = array.transpose([axis for axis in order if axis is not None])
    for place, axis in enumerate(order):
        if axis is None:
            turned = np.expand_dims(turned, place)
    return np.ascontiguousarray(turned)
