"""How long every layer of a model takes at every width that it may get, measured on the target's own runtime."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.graph.removable import Removable, TimedLayer
from whet.numerics.widths import Term
from whet.pipeline.side import Side
from whet.progress import task
from whet.runtimes.latency import alternate
from whet.runtimes.pinned import pinned
from whet.runtimes.sessions import open_session
from whet.specs import Target

MOST_WIDTHS = 6  # of one axis that are measured; times in between are interpolated
_SECONDS = 0.04  # of timing, for each width


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """The times of one kind of layer. ms: (widths made, widths read), the median of one call."""

    made: npt.NDArray[np.int64]
    read: npt.NDArray[np.int64]
    ms: npt.NDArray[np.float64]

    def at(self, made: int, read: int) -> float:
        """Milliseconds at these widths, bilinear between those that were measured."""
        rows = [float(np.interp(read, self.read, row)) for row in self.ms]
        return float(np.interp(made, self.made, rows))


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """The width of one axis: `full` less `each · lost` of every family (its index) that holds positions there."""

    full: int
    each: tuple[tuple[int, int], ...]

    def width(self, lost: Callable[[int], int]) -> int:
        """The width when each family has lost so many groups."""
        return self.full - sum(count * lost(family) for family, count in self.each)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """All times of `target`, as terms over the options of the families, and as rows for a report. files: how many."""

    terms: tuple[Term, ...]
    rows: tuple[dict[str, Any], ...]
    files: int
    target: str


def latency_table(
    side: Side,
    layers: Sequence[TimedLayer],
    found: Removable,
    options: Sequence[Sequence[int]],
    target: Target,
    *,
    progress: bool,
) -> Table:
    """Time every layer whose width may change, alone in a file of its own, at every pair of widths.

    Layers of one signature share their times. Files are timed in alternation, pinned to one processor, on one thread and one
    row; a time holds what opening a call costs, which cancels where only differences count.
    """
    places = [(layer, *_axes(found, layer)) for layer in layers]
    moving = [place for place in places if place[1].each or place[2].each]
    wanted: dict[Any, list[Any]] = {}
    for place in moving:
        wanted.setdefault(place[0].signature, []).append(place)
    times, files = {}, 0
    with task("Latency table", len(wanted), enabled=progress) as bar:
        for signature, alike in wanted.items():
            made, read = (_widths([place[axis] for place in alike], options) for axis in (1, 2))
            times[signature] = _timed(side, alike[0][0], made, read, target)
            files += times[signature].ms.size
            bar.advance(note=alike[0][0].name)
    terms = tuple(_term(layer, made, read, times[layer.signature], options) for layer, made, read in moving)
    rows = tuple(
        {"layer": layer.name, "calls": layer.calls, "made": made.full, "read": read.full, "ms": _full(times, layer, made, read)}
        for layer, made, read in moving
    )
    return Table(terms, rows, files, target.name)


def _full(times: Any, layer: TimedLayer, made: Axis, read: Axis) -> float:
    found: float = times[layer.signature].at(made.full, read.full)
    return found


def _axes(found: Removable, layer: TimedLayer) -> tuple[Axis, Axis]:
    """What is made and what is read; of a depthwise layer both are one."""

    def axis(number: int) -> Axis:
        each: dict[int, int] = {}
        for index, family in enumerate(found.families):
            for member in family.members:
                if (member.tensor, member.axis) == (layer.tensor, number):
                    each[index] = each.get(index, 0) + int(member.positions.shape[1])
        return Axis(found.groups.structure.held[layer.tensor].shape[number], tuple(each.items()))

    made = axis(layer.made)
    return made, Axis(made.full, ()) if layer.read is None else axis(layer.read)


def _widths(axes: Sequence[Axis], options: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """The widths to measure: all that some choice gives, or the ends and some between."""
    every: set[int] = set()
    for axis in axes:
        moved = [[count * lost for lost in options[family]] for family, count in axis.each]
        sums = {0}
        for part in moved:
            sums = {one + other for one in sums for other in part}
        every |= {axis.full - lost for lost in sums if lost < axis.full}
    found = np.asarray(sorted(every), np.int64)
    if len(found) <= MOST_WIDTHS:
        return found
    chosen: npt.NDArray[np.int64] = found[np.unique(np.round(np.linspace(0, len(found) - 1, MOST_WIDTHS)).astype(int))]
    return chosen


def _timed(side: Side, layer: TimedLayer, made: Any, read: Any, target: Target) -> Times:
    """One file for each pair of widths, all timed in alternation."""
    pairs = list(itertools.product(made.tolist(), read.tolist()))
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        sessions, example = [], None
        for index, pair in enumerate(pairs):
            model, example = layer.build(*pair)
            path = Path(folder) / f"{index}{target.suffix}"
            side.export(model, None, target, path, example=example)
            sessions.append((open_session(path, threads=1), example))
        groups: dict[Any, list[int]] = {}
        for index, (_, given) in enumerate(sessions):
            groups.setdefault(given.shape, []).append(index)
        flat = np.zeros(len(pairs))
        with pinned():
            for indices in groups.values():  # files are timed together that take the same input
                batch = sessions[indices[0]][1]
                several = alternate([sessions[i][0] for i in indices], batch, budget_s=_SECONDS * len(indices), warmup=3)
                for index, timing in zip(indices, several, strict=True):
                    flat[index] = float(np.median(timing.ms))
    return Times(made, read, flat.reshape(len(made), len(read)))


def _term(layer: TimedLayer, made: Axis, read: Axis, times: Times, options: Sequence[Sequence[int]]) -> Term:
    families = tuple(dict.fromkeys(family for axis in (made, read) for family, _ in axis.each))

    def ms(chosen: tuple[int, ...]) -> float:
        taken = dict(zip(families, chosen, strict=True))

        def lost(family: int) -> int:
            return options[family][taken[family]]

        return layer.calls * times.at(made.width(lost), read.width(lost))

    return Term(families, ms)
