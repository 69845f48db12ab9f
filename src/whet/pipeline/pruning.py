"""One pruning step of a `Compressed`: masks on its weights, or real removal."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from whet.data import Batches
from whet.errors import DataError
from whet.graph.groups import Groups
from whet.pipeline.block_latency import remove_blocks_to_latency
from whet.pipeline.blocks import remove_blocks
from whet.pipeline.compressed import Compressed, plain_model
from whet.pipeline.expectation import expectation
from whet.pipeline.latency import prune_to_latency
from whet.pipeline.sensitive_pruning import prune_by_sensitivity
from whet.pipeline.side import side_of
from whet.records import Step
from whet.specs import BySensitivity, Layer, Prune, Target, find_target


def prune_step(
    compressed: Compressed, spec: Prune, data: Batches | None, target: Target | None = None, *, progress: bool = False
) -> Step:
    """*In place*: prune the float model of `compressed` as `spec` says; `data` is for criteria that need it.

    target: whose file a latency is measured on, by default the framework's own. What to expect of it is logged (logger "whet")
    before anything is done, and kept in the step.

    Raises:
        DataError: removal follows channels and has no example to trace with.
        ModelError: nothing would change.
    """
    told = expectation(spec, target)
    logging.getLogger("whet").info(told)
    step = _pruned(compressed, spec, data, target, progress)
    return replace(step, control={**(step.control or {}), "expected": told})


def only_removes(spec: Prune) -> bool:
    """Whether `prune_step` is the side's `remove` and nothing else, which leaves the model that it is given as it is."""
    measured = isinstance(spec.allocation, BySensitivity) or spec.latency is not None
    return spec.removes and not measured and not isinstance(spec.granularity, Layer)


def _pruned(compressed: Compressed, spec: Prune, data: Batches | None, target: Target | None, progress: bool) -> Step:
    by_sensitivity = isinstance(spec.allocation, BySensitivity)
    if compressed.example is None and (by_sensitivity or spec.removes):
        what = "BySensitivity measures outputs" if by_sensitivity else "Removing channels or heads traces the model"
        raise DataError(f"{what} and needs a batch: pass example= or train=.")
    if by_sensitivity:
        return prune_by_sensitivity(compressed, spec, data, progress=progress)
    if spec.latency is not None:
        rules = find_target(None, compressed.side.FRAMEWORK) if target is None else target
        if isinstance(spec.granularity, Layer):
            return remove_blocks_to_latency(compressed, spec, data, rules, progress=progress)
        return prune_to_latency(compressed, spec, data, rules, progress=progress)
    if isinstance(spec.granularity, Layer):
        return remove_blocks(compressed, spec, data)
    if spec.removes:
        compressed.float_model, compressed.masks, step = compressed.side.remove(
            compressed.float_model, spec, example=compressed.example, masks=compressed.masks, data=data, progress=progress
        )
        return step
    compressed.masks, step = compressed.side.prune(compressed.float_model, spec, masks=compressed.masks, data=data)
    return step


def groups(model: Any, example: Any) -> Groups:
    """The coupling groups of `model`: what leaves together, what it holds and costs, and what stays and why. Prints as a table.

    `example` is a batch's inputs. Channels of one group are the rows of a layer, its batch norm's numbers and the columns of
    every layer that reads them.

    Raises:
        ModelError: the model's graph cannot be drawn.
    """
    plain = plain_model(model)
    inputs, _ = Batches([example], "example").first()
    return side_of(plain).groups(plain, inputs)
