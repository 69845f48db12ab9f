"""Channels and heads removed from a Keras model: read, scored, chosen, cut, checked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from whet.data import Batches
from whet.errors import ModelError, SpecError
from whet.graph.groups import Gone, Groups
from whet.graph.ids import IntArray
from whet.graph.placement import unmatched
from whet.graph.selection import choose, eligible
from whet.graph.views import Masks
from whet.keras import surgery
from whet.keras.groups import read_model
from whet.keras.importance import scores_of
from whet.keras.model import copy
from whet.keras.sizes import named_weights
from whet.keras.views import walk
from whet.records import Step
from whet.specs import Prune, to_dict


def remove(
    model: Any, spec: Prune, *, example: Any, masks: Masks | None = None, data: Batches | None = None
) -> tuple[Any, Masks, Step]:
    """A smaller model of the same class without the least important channels or heads; `model` is unchanged.

    Masks from before lose the same positions.

    Raises:
        ModelError: the model has no layer graph, nothing would leave, or the result is not the original with the removed
            channels silenced.
        SpecError: the criterion needs data, or `rebuild` is set.
    """
    if spec.rebuild is not None:
        raise SpecError(
            "Prune.rebuild='graph' is for PyTorch; a Keras model's layer graph is always drawn again. Leave it out."
        )
    started, work = time.perf_counter(), copy(model)
    reading = read_model(work, example)
    groups, found = reading.groups, eligible(reading.groups, spec)
    refused = surgery.refused(reading, found.families)
    families = [family for family in found.families if family.name not in refused]
    skipped = [*found.skipped, *((f.layer, refused[f.name]) for f in found.families if f.name in refused)]
    if not families:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:8])
        raise ModelError(f"Prune can remove nothing from this model ({reasons}). See whet.groups(model, example).")
    gone = choose(groups, families, scores_of(work, families, spec.criterion, data), spec)
    kept, names = groups.kept(gone), [path for path, _ in walk(work)] + list(named_weights(work))
    step = Step(
        to_dict(spec),
        changed(groups, gone),
        tuple({"name": name, "reason": reason} for name, reason in dict.fromkeys(skipped)),
        0.0,
        unmatched=tuple(unmatched(dict.fromkeys(names, ()), (*spec.keep, *(spec.include or ())))),
    )
    made = surgery.removed(work, reading, gone, example)
    step = replace(step, seconds=time.perf_counter() - started)
    return made, cut_masks(masks or {}, kept), step


def changed(groups: Groups, gone: Gone) -> tuple[dict[str, Any], ...]:
    """A row for each smaller weight: `{"name", "parameters", "sparsity", "shape", "left"}`, shapes before and after."""
    rows = []
    for name, axes in groups.kept(gone).items():
        shape = groups.structure.held[name].shape
        left = [len(axes[d]) if d in axes else n for d, n in enumerate(shape)]
        size = int(np.prod(shape))
        rows.append(
            {"name": name, "parameters": size, "sparsity": 1 - int(np.prod(left)) / size, "shape": list(shape), "left": left}
        )
    return tuple(rows)


def cut_masks(masks: Masks, kept: Mapping[str, Mapping[int, IntArray]]) -> Masks:
    """Masks of weights that have lost positions, without these."""
    out = {}
    for name, mask in masks.items():
        for axis, positions in kept.get(name, {}).items():
            mask = np.take(mask, positions, axis)
        out[name] = np.ascontiguousarray(mask)
    return out
