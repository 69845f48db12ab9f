"""Channels and heads removed from a Keras model: read, scored, chosen, cut, checked."""

from __future__ import annotations

import time
from typing import Any

from whet.data import Batches
from whet.errors import SpecError
from whet.graph.cutting import changed, cut_masks, difference
from whet.graph.placement import unmatched
from whet.graph.reconstruction import check_reconstruct
from whet.graph.removable import may_leave
from whet.graph.selection import choose, eligible
from whet.graph.views import Masks
from whet.keras import surgery
from whet.keras.constants import fold_constants
from whet.keras.groups import read_model
from whet.keras.importance import scores_of
from whet.keras.model import copy, random_state_kept
from whet.keras.optimizers import slice_optimizer
from whet.keras.reconstruction import reconstruct
from whet.keras.sizes import named_weights
from whet.keras.views import walk
from whet.records import Step
from whet.specs import Prune, to_dict


def borrow(model: Any) -> Any:
    """What `remove` may be given without a copy of `model` being made first: `model` itself, since it makes its own."""
    return model


def own(model: Any, lender: Any) -> None:
    """Nothing: what `remove` gives shares no weight with `lender`."""


def remove(
    model: Any,
    spec: Prune,
    *,
    example: Any,
    masks: Masks | None = None,
    data: Batches | None = None,
    optimizer: Any = None,
    progress: bool = False,
) -> tuple[Any, Masks, Step]:
    """A smaller model of the same class without the least important channels or heads; `model` is unchanged.

    Masks from before lose the same positions, and so does `optimizer`, *in place*: an optimizer that trained `model` trains
    the smaller model from then on, with the momenta of what is left.

    Raises:
        ModelError: the model has no layer graph, nothing would leave, or the result is not the original with the removed
            channels silenced.
        SpecError: the criterion needs data, or `rebuild` is set.
        DataError: the reconstruction needs data.
    """
    check_reconstruct(spec, data)
    if spec.rebuild is not None:
        raise SpecError(
            "Prune.rebuild='graph' is for PyTorch; a Keras model's layer graph is always drawn again. Leave it out."
        )
    started, work = time.perf_counter(), copy(model)
    reading = read_model(work, example)
    groups, found = reading.groups, eligible(reading.groups, spec)
    refused = surgery.refused(reading, found.families)
    families, skipped = may_leave(found, refused)
    gone = choose(groups, families, scores_of(work, list(families), spec.criterion, data), spec)
    kept, names = groups.kept(gone), [path for path, _ in walk(work)] + list(named_weights(work))
    original, tolerance = surgery.outputs(work, example), surgery.tolerance_of(work)
    solved = None
    if spec.reconstruct is not None and data is not None:
        options: dict[str, Any] = {"data": data, "example": example, "masks": masks or {}, "progress": progress}
        with random_state_kept():  # layers with a bias for the batch norm are initialized
            solved = reconstruct(work, reading, gone, spec.reconstruct, **options)
    constants = fold_constants(work, reading, gone, surgery.outputs, example)
    made, worst = surgery.removed(work, reading, gone, example)
    if optimizer is not None:
        slice_optimizer(optimizer, model, made, kept)
    known = {"oracle": worst, "tolerance": tolerance, "change": difference(surgery.outputs(made, example), original)}
    step = Step(
        to_dict(spec),
        changed(groups, gone),
        tuple({"name": name, "reason": reason} for name, reason in dict.fromkeys(skipped)),
        time.perf_counter() - started,
        unmatched=tuple(unmatched(dict.fromkeys(names, ()), (*spec.keep, *(spec.include or ())))),
        removal=known | constants.to_dict() | ({} if solved is None else {"reconstructed": solved.to_dict()}),
    )
    return made, cut_masks(masks or {}, kept), step
