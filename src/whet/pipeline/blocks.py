"""Whole layers removed from a `Compressed`: found in the graph, measured on data, chosen, and replaced by their shortcuts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from whet.data import Batches, leaves, primary
from whet.errors import DataError, ModelError, SpecError
from whet.graph.block_choice import Left, Measure, choose_blocks, eligible_blocks
from whet.graph.placement import unmatched
from whet.graph.shortcuts import Block, Blocks
from whet.numerics.layers import output_error
from whet.pipeline.compressed import Compressed
from whet.pipeline.sensitivity import classes_of, log_probabilities
from whet.records import Step
from whet.specs import BlockInfluence, LossChange, Prune, to_dict

Rows = list[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Measured:
    """The blocks that may leave, why others stay, and how blocks are measured."""

    blocks: tuple[Block, ...]
    skipped: tuple[tuple[str, str], ...]
    measure: Measure


def measured_blocks(compressed: Compressed, found: Blocks, spec: Prune, data: Batches | None) -> Measured:
    """What `spec` may remove of `found`.

    They are measured on the first batches of `data`; without data on the example, for criteria that need no targets.

    Raises:
        SpecError: the criterion needs targets. ModelError: no layer can leave.
    """
    blocks, skipped = eligible_blocks(found, spec)
    return Measured(blocks, skipped, _measure(found, [b.name for b in blocks], spec.criterion, _rows(compressed, spec, data)))


def remove_blocks(compressed: Compressed, spec: Prune, data: Batches | None) -> Step:
    """*In place*: remove whole layers of the float model of `compressed`; see `measured_blocks`.

    Raises:
        SpecError: the criterion needs targets. ModelError: no layer can leave, or the budget cannot be met.
    """
    started = time.perf_counter()
    found: Blocks = compressed.side.blocks(compressed.float_model, compressed.example)
    known = measured_blocks(compressed, found, spec, data)
    left = choose_blocks(known.blocks, spec, found.size(), known.measure, greedy=_is_greedy(spec))
    step = step_of(spec, found, known, left)
    compressed.float_model, compressed.masks = found.remove(left.names, compressed.masks)
    return replace(step, seconds=time.perf_counter() - started)


def step_of(spec: Prune, found: Blocks, known: Measured, left: Left) -> Step:
    """What is told of blocks that leave."""
    before = found.size()
    removed = [block for block in known.blocks if block.name in left.names]
    after = {name: getattr(before, name) - sum(getattr(b, name) for b in removed) for name in ("macs", "parameters", "bytes")}
    return Step(
        to_dict(spec),
        tuple(
            {"name": block.name, "parameters": block.parameters, "removed": 1.0, "sensitivity": left.importance[block.name]}
            for block in removed
        ),
        tuple({"name": name, "reason": reason} for name, reason in (*known.skipped, *_stayed(left))),
        0.0,
        unmatched=tuple(unmatched(dict.fromkeys(found.names, ()), (*spec.keep, *(spec.include or ())))),
        control={
            "layers": {
                "importance": dict(left.importance),
                "removed": list(left.names),
                "before": {name: getattr(before, name) for name in after},
                "after": after,
            }
        },
    )


def _stayed(left: Left) -> list[tuple[str, str]]:
    return [(name, f"stays (importance {value:.3g})") for name, value in left.importance.items() if name not in left.names]


def _is_greedy(spec: Prune) -> bool:
    return bool(getattr(spec.criterion, "greedy", False))


def _rows(compressed: Compressed, spec: Prune, data: Batches | None) -> Rows:
    """The batches that layers are measured on."""
    if isinstance(spec.criterion, LossChange) and (data is None or data.first()[1] is None):
        raise SpecError("LossChange needs targets: pass train= batches of (inputs, targets), or take OutputChange().")
    if data is None:
        return [(compressed.example, None)]
    return list(itertools.islice(data, getattr(spec.criterion, "batches", 8)))


def _measure(found: Blocks, names: Sequence[str], criterion: Any, rows: Rows) -> Measure:
    """The importance of every block, when some have left."""
    if isinstance(criterion, BlockInfluence):

        def influence(gone: Sequence[str]) -> dict[str, float]:
            parts = [found.influence(inputs) for inputs, _ in rows]
            return {n: sum(p[n][0] for p in parts) / max(sum(p[n][1] for p in parts), 1) for n in names}

        return influence
    reference = [found.without((), inputs) for inputs, _ in rows]
    if isinstance(criterion, LossChange):
        base = _loss(reference, rows)
        return lambda gone: {n: _loss(_outputs(found, (*gone, n), rows), rows) - base for n in names if n not in gone}
    flat = _flat(reference)
    return lambda gone: {
        n: _finite(output_error(flat, _flat(_outputs(found, (*gone, n), rows))), n) for n in names if n not in gone
    }


def _outputs(found: Blocks, gone: Sequence[str], rows: Rows) -> list[Any]:
    return [found.without(gone, inputs) for inputs, _ in rows]


def _flat(outputs: list[Any]) -> list[Any]:
    return [leaf for leaf in map(np.asarray, leaves(outputs)) if leaf.dtype.kind == "f"]


def _finite(value: float, name: str) -> float:
    if not np.isfinite(value):
        raise ModelError(f"Without {name!r} the model's outputs are not finite. Name it in keep=.")
    return value


def _loss(outputs: list[Any], rows: Rows) -> float:
    """Mean cross-entropy in nats where targets are classes, else the mean squared error."""
    total, count = 0.0, 0
    for made, (_, targets) in zip(outputs, rows, strict=True):
        goal, array = np.asarray(primary(targets)), np.asarray(primary(made))
        kind = classes_of(array, goal)
        if kind is not None and goal.dtype.kind in "iu":
            logs = np.take_along_axis(log_probabilities(array, kind), goal[..., None].astype(np.int64), -1)
            total, count = total - float(logs.sum()), count + goal.size
        elif array.shape == goal.shape:
            total, count = total + float(np.sum(np.square(array.astype(np.float64) - goal))), count + goal.size
        else:
            raise DataError(
                f"LossChange knows cross-entropy of classes and the squared error; outputs have shape {array.shape}, targets "
                f"{goal.shape}. Take OutputChange(), which needs no targets."
            )
    return total / max(count, 1)
