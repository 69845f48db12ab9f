"""The score of every coupling group of a Keras model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from whet.data import Batches, primary
from whet.errors import DataError, SpecError
from whet.graph.groups import Family, Member
from whet.keras.distill import ends_in_softmax
from whet.keras.gradients import gradients
from whet.keras.model import arrange
from whet.keras.objective import default_loss
from whet.keras.sizes import named_weights
from whet.keras.views import own_weights, to_numpy, walk
from whet.numerics.criteria import geometric_median, group_norm, random_scores, weight_importance
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs import BatchNormScale, Fisher, GeometricMedian, Magnitude, Random, Taylor, UserCriterion

Floats = npt.NDArray[np.float64]
Arrays = Mapping[str, npt.NDArray[Any]]


def scores_of(model: Any, families: Sequence[Family], criterion: Any, data: Batches | None) -> list[Floats]:
    """One score for each group of each family; the lowest leave first.

    Raises:
        SpecError: the criterion needs data and there is none, or batch norms and a family has none.
    """
    if isinstance(criterion, Random):
        return [random_scores(criterion.seed, i, (len(family),)) for i, family in enumerate(families)]
    weights = {name: to_numpy(variable) for name, variable in named_weights(model).items()}
    if isinstance(criterion, BatchNormScale):
        return [_scale(model, weights, family) for family in families]
    if isinstance(criterion, GeometricMedian):
        return [geometric_median(_filters(weights, family)) for family in families]
    slopes = gradients_for(model, criterion, data)
    if isinstance(criterion, Taylor | Fisher) and not slopes:
        raise SpecError(f"The criterion {type(criterion).__name__} needs data: pass train= batches of (inputs, targets).")
    power = criterion.p if isinstance(criterion, Magnitude) else 1
    vectors: dict[tuple[str, int], Floats] = {}

    def part(member: Member) -> Floats:
        where = (member.tensor, member.axis)
        if where not in vectors:
            weight = weights[member.tensor].astype(np.float32)
            score = np.abs(weight_importance(criterion, weight, slopes.get(member.tensor), xp=xp)) ** power
            others = tuple(d for d in range(score.ndim) if d != member.axis)
            vectors[where] = score.sum(others, dtype=np.float64)
        found: Floats = vectors[where][member.positions].sum(1)
        return found

    return [group_norm([part(member) for member in _weights(weights, family)], power) for family in families]


def _weights(weights: Arrays, family: Family) -> list[Member]:
    """The members that are kernels; all where there are none."""
    return [member for member in family.members if weights[member.tensor].ndim > 1] or list(family.members)


def _filters(weights: Arrays, family: Family) -> Floats:
    """The weights that produce each group, flat: (groups, size)."""
    member = family.members[0]
    front = np.moveaxis(weights[member.tensor], member.axis, 0)
    rows = front.reshape(len(front), -1)[member.positions]
    return rows.reshape(len(rows), -1).astype(np.float64)


def _scale(model: Any, weights: Arrays, family: Family) -> Floats:
    """`Σ |γ|` of the batch norms on a family's channels."""
    norms = {
        f"{path}/{variable.name}"
        for path, layer in walk(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in own_weights(layer)
        if variable is layer.gamma
    }
    found = [member for member in family.members if member.tensor in norms]
    if not found:
        raise SpecError(
            f"BatchNormScale needs a batch norm behind every pruned layer, and {family.layer} has none. Name it in keep=, or "
            "take Magnitude()."
        )
    return group_norm([np.abs(weights[m.tensor]).astype(np.float64)[m.positions].sum(1) for m in found], 1)


def gradients_for(model: Any, criterion: Any, data: Batches | None) -> dict[str, Any]:
    """By weight name the mean of ∂L/∂w over some batches, of its square for Fisher.

    Empty without data, and for criteria that need none.
    """
    if data is None or not isinstance(criterion, Taylor | Fisher | UserCriterion):
        return {}
    named = {name: variable for name, variable in named_weights(model).items() if "float" in str(variable.dtype)}
    sums: dict[str, Any] = {}
    count, is_normalized = 0, ends_in_softmax(model)
    for count, (inputs, targets) in enumerate(data, 1):
        given = keras.tree.map_structure(keras.ops.convert_to_tensor, arrange(model, inputs))
        wanted = keras.ops.convert_to_tensor(targets)

        def loss(given: Any = given, wanted: Any = wanted) -> Any:
            return default_loss(primary(model(given, training=False)), wanted, is_normalized=is_normalized)

        for name, gradient in zip(named, gradients(loss, list(named.values())), strict=True):
            if gradient is not None:
                value = gradient.astype(np.float64)
                sums[name] = sums.get(name, 0) + (value**2 if isinstance(criterion, Fisher) else value)
        if count >= getattr(criterion, "batches", 8):
            break
    if not count:
        raise DataError("train= held no batches.")
    return {name: (total / count).astype(np.float32) for name, total in sums.items()}
