"""The score of every coupling group: what it holds in all tensors, reduced to one number."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import SpecError
from whet.graph.groups import Family, Member
from whet.numerics.criteria import geometric_median, group_norm, random_scores, weight_importance
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs import Activation, BatchNormScale, GeometricMedian, Magnitude, Random, SparseGPT

Floats = npt.NDArray[np.float64]
Read = Callable[[str], npt.NDArray[Any]]  # a tensor's values by its name
Statistics = Mapping[str, npt.NDArray[Any]]  # by tensor name, as `weight_importance` takes them


def family_scores(
    families: Sequence[Family], criterion: Any, read: Read, statistics: Statistics, scales: Collection[str]
) -> list[Floats]:
    """One score for each group of each family; the lowest leave first. scales: the names of batch-norm scales.

    The score of a group is the sum over all weights that it holds, for `Magnitude` their Lp norm; for `Activation` the norm
    of what its readers get.

    Raises:
        SpecError: the criterion needs data and there is none, or batch norms and a family has none.
    """
    if isinstance(criterion, Random):
        return [random_scores(criterion.seed, i, (len(family),)) for i, family in enumerate(families)]
    if isinstance(criterion, BatchNormScale):
        return [_scale(family, read, scales) for family in families]
    if isinstance(criterion, GeometricMedian):
        return [geometric_median(_filters(family.members[0], read)) for family in families]
    if isinstance(criterion, SparseGPT):
        raise SpecError("SparseGPT changes the weights that remain of a mask, and channels have none: take OBS().")
    if isinstance(criterion, Activation):
        return [_activation(family, statistics) for family in families]
    power = criterion.p if isinstance(criterion, Magnitude) else 1
    vectors: dict[tuple[str, int], Floats] = {}

    def part(member: Member) -> Floats:
        where = (member.tensor, member.axis)
        if where not in vectors:
            weight = read(member.tensor).astype(np.float32)
            scores = weight_importance(criterion, weight, statistics.get(member.tensor), xp=xp) ** power
            vectors[where] = _over_others(scores, member.axis, np.sum)
        found: Floats = vectors[where][member.positions].sum(1)
        return found

    def parts(family: Family) -> list[Floats]:
        held = weights_of(family, read)
        if statistics and any(member.tensor in statistics for member in held):
            held = [member for member in held if member.tensor in statistics]
        return [part(member) for member in held]

    return [group_norm(parts(family), power) for family in families]


def weights_of(family: Family, read: Read) -> list[Member]:
    """The members that are weights; all parameters where there are none."""
    own = [member for member in family.members if member.is_parameter]
    return [member for member in own if read(member.tensor).ndim > 1] or own


def _over_others(scores: npt.NDArray[Any], axis: int, reduce: Any) -> Floats:
    """`scores` reduced over all axes but `axis`."""
    found: Floats = reduce(scores, axis=tuple(d for d in range(scores.ndim) if d != axis), dtype=np.float64)
    return found


def _activation(family: Family, statistics: Statistics) -> Floats:
    """`(Σ E[x²])^½` over the layers that read a family's channels, which `statistics` hold as `√E[x²]` for each weight."""
    readers = [member for member in family.members if member.contracted and member.tensor in statistics]
    if not readers:
        raise SpecError(
            f"Activation looks at what layers read: pass batches as train=. If they are there, no convolution or linear "
            f"layer reads the channels of {family.layer}: name it in keep=."
        )
    parts = [_over_others(statistics[m.tensor] ** 2, m.axis, np.mean)[m.positions].sum(1) for m in readers]
    return group_norm(parts, 2)


def _filters(member: Member, read: Read) -> Floats:
    """The weights that produce each group, flat: (groups, size)."""
    front = np.moveaxis(read(member.tensor), member.axis, 0)
    rows = front.reshape(len(front), -1)[member.positions]
    return rows.reshape(len(rows), -1).astype(np.float64)


def _scale(family: Family, read: Read, scales: Collection[str]) -> Floats:
    """`Σ |γ|` of the batch norms on a family's channels."""
    found = [member for member in family.members if member.tensor in scales]
    if not found:
        raise SpecError(
            f"BatchNormScale needs a batch norm behind every pruned layer, and {family.layer} has none. Name it in keep=, or "
            "take Magnitude()."
        )
    return group_norm([np.abs(read(m.tensor)).astype(np.float64)[m.positions].sum(1) for m in found], 1)
