"""What is removed: single weights, patterns of them, or whole structures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from whet.errors import SpecError
from whet.specs.base import MAPPING, check_integer, spec


@spec
@dataclass(frozen=True, slots=True)
class Weight:
    """Single weights are removed (unstructured)."""


@spec
@dataclass(frozen=True, slots=True)
class NM:
    """Of every `m` weights in a row along the input axis, `n` are kept (Mishra et al. 2021, arXiv:2104.08378)."""

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_integer("NM.m", self.m, low=2, high=64)
        check_integer("NM.n", self.n, low=1, high=self.m - 1)


@spec
@dataclass(frozen=True, slots=True)
class Block:
    """Blocks of `rows` (outputs) × `columns` (inputs) weights are removed together."""

    rows: int = 4
    columns: int = 1

    def __post_init__(self) -> None:
        check_integer("Block.rows", self.rows, low=1)
        check_integer("Block.columns", self.columns, low=1)


@spec
@dataclass(frozen=True, slots=True)
class Channel:
    """Whole channels, neurons and features leave: tensors become smaller."""


@spec
@dataclass(frozen=True, slots=True)
class Head:
    """Whole attention heads leave: tensors become smaller."""


@spec
@dataclass(frozen=True, slots=True)
class Layer:
    """Whole layers leave: residual blocks, and the layers of a transformer, whose shortcut takes their place.

    count: how many leave; None where `Prune` says it: a fraction of them all as sparsity=, or a budget.
    """

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None:
            check_integer("Layer.count", self.count, low=1)


@spec
@dataclass(frozen=True, slots=True)
class Group:
    """Positions that you name leave, `{parameter: {axis: positions}}`: tensors become smaller.

    What is coupled with them, as `whet.groups` prints it, must be named too, or is taken along with `coupled=True`.
    """

    positions: Mapping[str, Mapping[int, tuple[int, ...]]] = field(metadata=MAPPING)
    _: KW_ONLY
    coupled: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.positions, Mapping) or not self.positions:
            raise SpecError(f"Group.positions must map parameters to {{axis: positions}}, got {self.positions!r}.")
        plain = {str(name): _axes(str(name), axes) for name, axes in self.positions.items()}
        object.__setattr__(self, "positions", plain)
        if not isinstance(self.coupled, bool):
            raise SpecError(f"Group.coupled must be True or False, got {self.coupled!r}.")

    def __hash__(self) -> int:
        rows = ((name, tuple(sorted(axes.items()))) for name, axes in sorted(self.positions.items()))
        return hash((tuple(rows), self.coupled))


def _axes(name: str, axes: Any) -> dict[int, tuple[int, ...]]:
    """The positions on every axis, sorted, each once; JSON and YAML give axes as text."""
    if not isinstance(axes, Mapping) or not axes:
        raise SpecError(f"Group.positions[{name!r}] must map axes to positions, as {{0: (1, 5)}}, got {axes!r}.")
    found = {}
    for axis, positions in axes.items():
        number = int(axis) if isinstance(axis, str) and axis.isdecimal() else axis
        check_integer(f"An axis of Group.positions[{name!r}]", number, low=0)
        if not isinstance(positions, list | tuple) or not positions:
            raise SpecError(f"Group.positions[{name!r}][{number}] must be a tuple of positions, got {positions!r}.")
        for position in positions:
            check_integer(f"A position in Group.positions[{name!r}][{number}]", position, low=0)
        found[number] = tuple(sorted(set(positions)))
    return found


MASKED, REMOVED = (Weight, NM, Block), (Channel, Head, Layer, Group)
Granularity = Weight | NM | Block | Channel | Head | Layer | Group
