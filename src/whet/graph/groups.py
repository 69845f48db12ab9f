"""Coupling groups: what leaves together, what it holds and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whet import htmltext
from whet.graph.ids import IntArray
from whet.graph.structure import Structure

Gone = npt.NDArray[np.bool_]  # for every id: whether it leaves


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """The positions of one axis of one tensor that a family's groups hold.

    positions: (groups, positions of each). contracted: zero weights there silence the group (a layer that reads it).
    """

    tensor: str
    axis: int
    positions: IntArray
    contracted: bool
    is_parameter: bool


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Groups that hold the same axes of the same tensors: the channels of a layer, the heads of an attention.

    name: the tensor and axis that produce it. kind: "channel" or "head". roots: the id of each group. parameters, macs,
    bytes: of one group, when it alone leaves. sites: operations with sizes written into them that change along.
    """

    name: str
    kind: str
    roots: IntArray
    members: tuple[Member, ...]
    parameters: int
    bytes: int
    macs: int
    sites: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.roots)

    @property
    def width(self) -> int:
        """How many positions of its producing axis a group holds."""
        return int(self.members[0].positions.shape[1])

    @property
    def layer(self) -> str:
        """The layer that users name in keep and include."""
        return layer_named(self.members[0].tensor)


def layer_named(tensor: str) -> str:
    """The layer that users name: the path of the module whose weight or bias this is, else the tensor's own name.

    Keras' names are `layer path/variable`.
    """
    if "/" in tensor:
        return tensor.rpartition("/")[0]
    path, _, last = tensor.rpartition(".")
    return path if path and ("weight" in last or "bias" in last) else tensor


@dataclass(frozen=True, slots=True)
class Fixed:
    """An axis of a parameter of which some positions stay, and why."""

    tensor: str
    axis: int
    positions: int
    reason: str


@dataclass(frozen=True, slots=True)
class Size:
    """What a model costs: multiply-accumulates of one example, parameters, bytes of its parameters in memory."""

    macs: int
    parameters: int
    bytes: int


class Groups:
    """All coupling groups of a model, printable; `size` says what would be left without some of them."""

    def __init__(self, structure: Structure, rows: int = 1) -> None:
        """`structure` is solved already; `rows` is the number of examples it was read with."""
        self.structure = structure
        self._rows = max(rows, 1)
        self._held = {name: [self._roots(axis) for axis in held.value] for name, held in structure.held.items()}
        self._costs = [(cost, [self._roots(dim) for dim in cost.dims]) for cost in structure.costs]
        self.families: tuple[Family, ...] = _families(self)
        self.fixed: tuple[Fixed, ...] = _fixed(structure)

    def _roots(self, ids: IntArray) -> IntArray:
        return self.structure.ids.find(ids)

    def held_roots(self) -> Mapping[str, list[IntArray]]:
        """For every tensor and axis, the group id of each position."""
        return self._held

    def named(self, name: str) -> Family:
        """The family of this name."""
        return next(family for family in self.families if family.name == name)

    def gone(self, roots: Sequence[IntArray] | IntArray = ()) -> Gone:
        """These groups leave."""
        marked = np.zeros(len(self.structure.ids), bool)
        for part in roots:
            marked[part] = True
        return marked

    def kept(self, gone: Gone) -> dict[str, dict[int, IntArray]]:
        """The positions that remain, of every axis of every tensor that loses some."""
        return {
            name: found
            for name, axes in self._held.items()
            if (found := {d: np.flatnonzero(~gone[axis]) for d, axis in enumerate(axes) if gone[axis].any()})
        }

    def read(self, gone: Gone) -> dict[str, dict[int, IntArray]]:
        """The positions, of every axis of every tensor, that read what is gone: zeros there silence it."""
        ids, found = self.structure.ids, dict[str, dict[int, IntArray]]()
        for name, axes in self._held.items():
            held = self.structure.held[name].value
            readers = {d: gone[axis] & ids.is_contracted(held[d]) for d, axis in enumerate(axes)}
            if any(at.any() for at in readers.values()):
                found[name] = {d: np.flatnonzero(at) for d, at in readers.items() if at.any()}
        return found

    def is_empty(self, gone: Gone) -> str | None:
        """A tensor that would have no position left on some axis."""
        for name, axes in self._held.items():
            if any(len(axis) and gone[axis].all() for axis in axes):
                return name
        return None

    def size(self, gone: Gone | None = None) -> Size:
        """What the model costs without the groups that are `gone`."""
        gone = self.gone() if gone is None else gone
        macs = sum(cost.constant * math.prod(int((~gone[dim]).sum()) for dim in dims) for cost, dims in self._costs)
        parameters, size = 0, 0
        for name, axes in self._held.items():
            held = self.structure.held[name]
            if held.is_parameter:
                count = math.prod(int((~gone[axis]).sum()) for axis in axes)
                parameters, size = parameters + count, size + count * held.itemsize
        return Size(macs // self._rows, parameters, size)

    def macs_of(self, chosen: Callable[[str], bool]) -> int:
        """Multiply-accumulates of one example in the layers whose names are `chosen`."""
        costs = (cost for cost, _ in self._costs if chosen(cost.layer))
        return sum(cost.constant * math.prod(map(len, cost.dims)) for cost in costs) // self._rows

    def to_dict(self) -> dict[str, Any]:
        """Families and fixed axes in plain values."""
        return {
            "families": [
                {
                    "name": family.name,
                    "kind": family.kind,
                    "groups": len(family),
                    "parameters": family.parameters,
                    "macs": family.macs,
                    "bytes": family.bytes,
                    "members": [
                        {"tensor": m.tensor, "axis": m.axis, "positions": m.positions.tolist()} for m in family.members
                    ],
                }
                for family in self.families
            ],
            "fixed": [{"tensor": f.tensor, "axis": f.axis, "positions": f.positions, "reason": f.reason} for f in self.fixed],
        }

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]:
        header = ("groups of", "kind", "groups", "parameters each", "MACs each", "members (tensor, axis, positions each)")
        body: list[tuple[str, ...]] = [
            (
                family.name,
                family.kind,
                f"{len(family):,}",
                f"{family.parameters:,}",
                f"{family.macs:,}",
                ", ".join(
                    f"{m.tensor}[{m.axis}]" + f"×{m.positions.shape[1]}" * (m.positions.shape[1] > 1) for m in family.members
                ),
            )
            for family in self.families
        ]
        return header, body, [f"stays: {f.tensor}[{f.axis}], {f.positions} positions: {f.reason}" for f in self.fixed]

    def __str__(self) -> str:
        header, body, notes = self._table()
        widths = [max(len(row[i]) for row in (header, *body)) for i in range(5)]

        def line(cells: tuple[str, ...]) -> str:
            left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(cells[2:5], widths[2:5], strict=True)]
            return "  ".join((*left, *right, cells[5]))

        return "\n".join([line(header), *(line(row) for row in body), *notes])

    def _repr_html_(self) -> str:
        header, body, notes = self._table()
        return htmltext.table(header, body, notes=notes)


def _families(groups: Groups) -> tuple[Family, ...]:
    structure = groups.structure
    axes = [(name, d) for name, held in groups.held_roots().items() for d in range(len(held))]
    free: dict[int, list[tuple[int, int]]] = {}  # root -> [(axis number, position)]
    for number, (name, d) in enumerate(axes):
        roots = groups.held_roots()[name][d]
        open_ = np.flatnonzero(~structure.ids.is_fixed(roots))
        for position, root in zip(open_.tolist(), roots[open_].tolist(), strict=True):
            free.setdefault(root, []).append((number, position))
    signed: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root, places in free.items():
        counts: dict[int, int] = {}
        for number, _ in places:
            counts[number] = counts.get(number, 0) + 1
        signed.setdefault(tuple(counts.items()), []).append(root)
    heads = np.concatenate([structure.ids.find(axis) for axis in structure.heads]) if structure.heads else np.zeros(0, np.int64)
    sites = [(site.name, set(structure.ids.find(np.concatenate(site.pieces)).tolist())) for site in structure.sites]
    entries = _entries(groups)
    made = []
    for signature, found in signed.items():
        members = tuple(
            _member(structure, axes[number], np.asarray([[p for n, p in free[root] if n == number] for root in found]))
            for number, _ in signature
        )
        if any(member.is_parameter for member in members):
            roots = np.asarray(found)
            touched = tuple(dict.fromkeys(name for name, ids in sites if not ids.isdisjoint(found)))
            kind = "head" if np.isin(roots, heads).any() else "channel"
            made.append(_family(groups, kind, roots, members, touched, entries))
    return tuple(_named_apart(made))


def _member(structure: Structure, axis: tuple[str, int], positions: IntArray) -> Member:
    name, d = axis
    held = structure.held[name]
    contracted = bool(structure.ids.is_contracted(held.value[d]).any())
    return Member(name, d, positions, contracted, held.is_parameter)


def _family(
    groups: Groups,
    kind: str,
    roots: IntArray,
    members: tuple[Member, ...],
    sites: tuple[str, ...],
    entries: Mapping[int, list[tuple[int, int, int]]],
) -> Family:
    def rank(member: Member) -> tuple[bool, bool, int]:
        return (not member.is_parameter, member.contracted, -len(groups.structure.held[member.tensor].shape))

    members = tuple(sorted(members, key=rank))  # stable: the tensor that produces comes first
    lost: dict[str, list[tuple[int, int]]] = {}
    for member in members:
        if member.is_parameter:
            lost.setdefault(member.tensor, []).append((member.axis, member.positions.shape[1]))
    count, size = 0, 0
    for name, axes in lost.items():
        held = groups.structure.held[name]
        left = list(held.shape)
        for axis, width in axes:
            left[axis] -= width
        fewer = math.prod(held.shape) - math.prod(left)
        count, size = count + fewer, size + fewer * held.itemsize
    macs = _macs_of(groups, entries.get(int(roots[0]), []))
    first = members[0]
    name = first.tensor if first.axis == groups.structure.held[first.tensor].out else f"{first.tensor}[{first.axis}]"
    return Family(name, kind, roots, members, count, size, macs, sites)


def _entries(groups: Groups) -> dict[int, list[tuple[int, int, int]]]:
    """For every group the (cost, dimension, positions) it has a part in."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for number, (_, dims) in enumerate(groups._costs):
        for d, dim in enumerate(dims):
            roots, counts = np.unique(dim[~groups.structure.ids.is_fixed(dim)], return_counts=True)
            for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
                found.setdefault(root, []).append((number, d, count))
    return found


def _macs_of(groups: Groups, entries: list[tuple[int, int, int]]) -> int:
    saved = 0
    for number in {number for number, _, _ in entries}:
        cost, dims = groups._costs[number]
        sizes = [len(dim) for dim in dims]
        left = list(sizes)
        for other, d, count in entries:
            if other == number:
                left[d] -= count
        saved += cost.constant * (math.prod(sizes) - math.prod(left))
    return saved // groups._rows


def _named_apart(families: list[Family]) -> list[Family]:
    """Families of one axis are numbered: conv.weight, conv.weight #2."""
    seen: dict[str, int] = {}
    out = []
    for f in families:
        seen[f.name] = n = seen.get(f.name, 0) + 1
        name = f.name if n == 1 else f"{f.name} #{n}"
        out.append(Family(name, f.kind, f.roots, f.members, f.parameters, f.bytes, f.macs, f.sites))
    return out


def _fixed(structure: Structure) -> tuple[Fixed, ...]:
    """Axes of parameters that stay, but for kernel axes and axes of size 1."""
    rows = []
    for name, held in structure.held.items():
        for d, axis in enumerate(held.value):
            stays = axis[structure.ids.is_fixed(axis)]
            if len(stays) and len(axis) > 1 and held.is_parameter:
                reason = structure.ids.reason(int(stays[0]))
                if reason != "a kernel axis":
                    rows.append(Fixed(name, d, len(stays), reason))
    return tuple(rows)
