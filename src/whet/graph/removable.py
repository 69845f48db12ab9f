"""What may leave a model and what it is worth, before anything is chosen: the ground of every measured choice."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from whet.errors import ModelError
from whet.graph.groups import Family, Gone, Groups
from whet.graph.named_groups import Eligible
from whet.numerics.criteria import normalised
from whet.specs import Group

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Removable:
    """The families of a model that may lose groups, and their scores.

    silenced: `with silenced(gone):` the model computes as if these groups had left. predict: its outputs on a batch, NumPy.
    """

    groups: Groups
    families: tuple[Family, ...]
    scores: tuple[Floats, ...]
    silenced: Callable[[Gone], AbstractContextManager[None]]
    predict: Callable[[Any], Any]

    def gone(self, lost: Sequence[int]) -> Gone:
        """The `lost` lowest groups of every family."""
        return self.groups.gone([roots for _, roots in self._lowest(lost)])

    def named(self, lost: Sequence[int]) -> Group:
        """The same by name, for the surgery."""
        positions: dict[str, dict[int, tuple[int, ...]]] = {}
        for family, roots in self._lowest(lost):
            member, at = family.members[0], np.isin(family.roots, roots)
            if at.any():
                axis = positions.setdefault(member.tensor, {})
                axis[member.axis] = (*axis.get(member.axis, ()), *member.positions[at].ravel().tolist())
        return Group(positions, coupled=True)

    def _lowest(self, lost: Sequence[int]) -> list[tuple[Family, Any]]:
        rows = zip(self.families, self.scores, lost, strict=True)
        return [(family, family.roots[np.argsort(score, kind="stable")[:count]]) for family, score, count in rows]

    def options(self, family: Family, *, round_to: int, most: int, least_kept: float = 0.0) -> list[int]:
        """Up to `most` numbers of groups that a family may lose, rising, 0 first; what is left is a multiple of `round_to`."""
        axis = len(self.groups.structure.held[family.members[0].tensor].value[family.members[0].axis])
        step = 1 if family.kind == "head" else round_to
        others = axis - len(family) * family.width
        limit = min(int((1 - least_kept) * len(family)), len(family) - 1)
        left = others + (len(family) - np.arange(1, limit + 1)) * family.width
        allowed = [0, *(np.flatnonzero(left % step == 0) + 1).tolist()]
        if len(allowed) <= most:
            return allowed
        chosen = np.unique(np.round(np.linspace(0, len(allowed) - 1, most)).astype(int))
        return [allowed[index] for index in chosen]

    def losses(self, family: int, options: Sequence[int]) -> list[float]:
        """What each option loses: the sum of the lowest scores, normalised so that families can be compared."""
        rising = np.concatenate([[0.0], np.cumsum(np.sort(normalised(self.scores[family])))])
        return [float(rising[lost]) for lost in options]


def may_leave(
    found: Eligible, refused: Mapping[str, str], hint: str = ""
) -> tuple[tuple[Family, ...], tuple[tuple[str, str], ...]]:
    """The families that are not refused, and (layer, reason) of all others. hint: what else an error may suggest.

    Raises:
        ModelError: there is none.
    """
    families = tuple(family for family in found.families if family.name not in refused)
    skipped = [*found.skipped, *((f.layer, refused[f.name]) for f in found.families if f.name in refused)]
    if not families:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:8])
        raise ModelError(f"Prune can remove nothing from this model ({reasons}). See whet.groups(model, example){hint}.")
    return families, tuple(skipped)


class TimedLayer(Protocol):
    """One layer with weights, that can be built alone at any width. calls: how often the model calls it.

    tensor: its weight; made, read: the weight's axes of output and input channels, None where they are one (depthwise).
    signature: equal for layers whose times are equal at equal widths.
    """

    name: str
    tensor: str
    made: int
    read: int | None
    signature: Hashable
    calls: int

    def build(self, made: int, read: int) -> tuple[Any, Any]:
        """A model of this layer alone at these widths, and an example of its input, one row."""
