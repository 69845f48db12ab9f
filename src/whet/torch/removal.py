"""Channels and heads removed from a PyTorch model: read, scored, chosen, cut, checked."""

from __future__ import annotations

import time
from typing import Any

from whet.data import Batches
from whet.errors import ModelError
from whet.graph.cutting import changed, cut_masks
from whet.graph.groups import Gone
from whet.graph.placement import unmatched
from whet.graph.reconstruction import check_reconstruct
from whet.graph.removable import may_leave
from whet.graph.selection import choose, eligible
from whet.graph.views import Masks
from whet.records import Step
from whet.specs import Prune, to_dict
from whet.torch.attributes import Change
from whet.torch.constants import fold_constants, put_back
from whet.torch.groups import Reading, read_model
from whet.torch.importance import scores_of
from whet.torch.rebuild import keep_records, new_sizes, plain_record, rebuilt
from whet.torch.reconstruction import reconstruct
from whet.torch.surgery import SIZES, Surgeon, departure, note, noted, slice_optimizer, tolerance_of


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
    """*In place* unless a graph is built: remove channels or heads of `model`.

    Masks from before, and an optimizer's state, lose the same positions.

    Raises:
        ModelError: the model's graph cannot be drawn, nothing would leave, or the result is not the original with the
            removed channels silenced.
        SpecError: the criterion needs data.
        DataError: the reconstruction needs data.
    """
    started, plain = time.perf_counter(), to_dict(spec)
    check_reconstruct(spec, data)
    reading = read_model(model, example, dynamic=spec.rebuild is not None)
    groups, surgeon = reading.groups, Surgeon(model, reading, example)
    found = eligible(groups, spec)
    refused = {row.family: row.reason for row in surgeon.refusals(found.families)} if spec.rebuild is None else {}
    families, skipped = may_leave(found, refused, hint=", or use rebuild='graph'")
    gone = choose(groups, families, scores_of(model, list(families), spec.criterion, data), spec)
    kept, before = groups.kept(gone), dict(model.named_parameters(remove_duplicate=False))
    original = surgeon.outputs()
    solved, replaced = None, list[tuple[Any, Any]]()
    if spec.reconstruct is not None and data is not None:
        options: dict[str, Any] = {"data": data, "example": example, "masks": masks or {}, "progress": progress}
        solved, replaced = reconstruct(model, reading, gone, spec.reconstruct, **options)
    constants = fold_constants(model, reading, gone)
    try:
        if spec.rebuild is None:
            record(model, surgeon.remove(gone))
        else:
            model = rebuild(model, reading, gone, surgeon, example)
    except ModelError:
        put_back(constants)
        for tensor, values in replaced:
            tensor.data = values
        raise
    if optimizer is not None:
        after = dict(model.named_parameters(remove_duplicate=False))
        slice_optimizer(optimizer, {id(before[name]): (after[name], axes) for name, axes in kept.items() if name in before})
    names = dict.fromkeys(name for name, _ in (*model.named_modules(), *before.items()) if name)
    step = Step(
        plain,
        changed(groups, gone),
        tuple({"name": name, "reason": reason} for name, reason in dict.fromkeys(skipped)),
        time.perf_counter() - started,
        unmatched=tuple(unmatched(dict.fromkeys(names, ()), (*spec.keep, *(spec.include or ())))),
        removal={
            "oracle": surgeon.departure,
            "tolerance": tolerance_of(model),
            "change": departure(model, example, original),
            **constants.to_dict(),
            **({} if solved is None else {"reconstructed": solved.to_dict()}),
        },
    )
    return model, cut_masks(masks or {}, kept), step


def rebuild(model: Any, reading: Reading, gone: Gone, surgeon: Surgeon, example: Any) -> Any:
    """The graph of `model` without the groups that are `gone`, checked against the model with them silenced.

    Raises:
        ModelError: it is not the same, or a size cannot be rewritten.
    """
    kept, sizes = reading.groups.kept(gone), new_sizes(reading.groups, gone)
    written = plain_record(model, example, kept, sizes)
    graph = None
    for expected in surgeon.references(gone):
        graph = rebuilt(model, reading, kept, sizes) if graph is None else graph
        surgeon.departure = departure(graph, example, expected)
        if surgeon.departure <= tolerance_of(graph):
            break
    else:
        raise ModelError(
            "The rebuilt graph is not the original with these channels silenced: an operation is followed wrongly (please "
            "report it). Name layers in keep= to find out which."
        )
    keep_records(model, graph, written)
    return graph


def record(model: Any, changes: list[Change]) -> None:
    """Keep what was set, so that saving and loading can set it again."""
    paths = {id(module): path for path, module in model.named_modules()}
    sizes: dict[str, dict[str, Any]] = {path: dict(row) for path, row in (noted(model, SIZES) or {}).items()}
    for change in changes:
        sizes.setdefault(paths[id(change.module)], {})[change.name] = change.value
    note(model, SIZES, sizes)
