"""Groups that a user names by positions: checked against the graph, so that nothing coupled with them is left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from whet.errors import ModelError, SpecError
from whet.graph.groups import Family, Gone, Groups
from whet.graph.ids import IntArray
from whet.specs import Group

_SHOWN = 6  # tensors that an error names


@dataclass(frozen=True, slots=True)
class Eligible:
    """families: what may lose groups; skipped: (layer, reason) of the rest."""

    families: tuple[Family, ...]
    skipped: tuple[tuple[str, str], ...]


def named_gone(groups: Groups, wanted: Group) -> Gone:
    """The groups that hold the positions of `wanted`.

    Raises:
        SpecError: there is no such parameter, axis or position; or one stays, with its reason.
        ModelError: what is coupled with them is not named, or an axis would be left empty.
    """
    held = groups.held_roots()
    roots: list[IntArray] = []
    for name, axes in wanted.positions.items():
        if name not in held:
            near = ", ".join(list(held)[:_SHOWN])
            raise SpecError(
                f"Group names {name!r}, and the model has no such parameter. Its parameters: {near}, … (whet.groups)."
            )
        for axis, positions in axes.items():
            roots.append(_roots(groups, name, axis, positions))
    gone = groups.gone(roots)
    empty = groups.is_empty(gone)
    if empty is not None:
        raise ModelError(f"Group would leave nothing of {empty!r}. Name fewer positions.")
    if not wanted.coupled:
        _check_complete(groups, wanted, gone)
    return gone


def _roots(groups: Groups, name: str, axis: int, positions: tuple[int, ...]) -> IntArray:
    axes, ids = groups.held_roots()[name], groups.structure.ids
    if axis >= len(axes):
        raise SpecError(f"Group names axis {axis} of {name!r}, whose shape is {groups.structure.held[name].shape}.")
    if positions[-1] >= len(axes[axis]):
        raise SpecError(
            f"Group names position {positions[-1]} of axis {axis} of {name!r}, which has {len(axes[axis])} (shape "
            f"{groups.structure.held[name].shape})."
        )
    found = axes[axis][list(positions)]
    fixed = np.flatnonzero(ids.is_fixed(found))
    if len(fixed):
        reason = ids.reason(int(found[fixed[0]]))
        raise SpecError(f"Position {positions[int(fixed[0])]} of axis {axis} of {name!r} stays: {reason}.")
    return found


def _check_complete(groups: Groups, wanted: Group, gone: Gone) -> None:
    """Parameters alone are asked for: buffers have no choice."""
    missing = {}
    for name, axes in groups.held_roots().items():
        for axis, roots in enumerate(axes) if groups.structure.held[name].is_parameter else ():
            named = wanted.positions.get(name, {}).get(axis, ())
            left = [int(at) for at in np.flatnonzero(gone[roots]) if int(at) not in named]
            if left:
                missing[f"{name}[{axis}]"] = left
    if missing:
        raise ModelError(
            f"Group is not complete: what it names is coupled with {_told(missing)}. Name these too, or write Group(…, "
            "coupled=True) to take them along."
        )


def _told(missing: Mapping[str, list[int]]) -> str:
    parts = [f"{name} {tuple(at)}" if len(at) <= _SHOWN else f"{name} ({len(at)} positions)" for name, at in missing.items()]
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


def named_families(groups: Groups, wanted: Group) -> Eligible:
    """The families that lose groups; the rest was not asked for and is not listed."""
    gone = named_gone(groups, wanted)
    return Eligible(tuple(family for family in groups.families if gone[family.roots].any()), ())
